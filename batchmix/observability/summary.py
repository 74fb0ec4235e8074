"""`.batchmix/summary.json`, and the lines at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from batchmix.observability.clock import StageClock
from batchmix.observability.engine_stats import EngineStats
from batchmix.observability.error_reasons import ErrorReasons, reason_lines
from batchmix.observability.progress import duration
from batchmix.observability.totals import Totals
from batchmix.storage import Storage, write_json

_STAGES = ("read", "tokenise", "prefill", "decode", "write")


@dataclass(frozen=True)
class RunStatistics:
    """What one run of one shard did."""

    totals: Totals
    stats: EngineStats
    clock: StageClock
    total_seconds: float
    device_seconds: float | None = None  # in which the device worked, by its own clock; None: a CPU, which has none

    def as_json(self) -> dict[str, Any]:
        """Its part of `summary.json`; read, tokenise and write run beside prefill and decode."""
        generate = (self.stats.last_token_time or 0.0) - (self.stats.first_prefill_time or 0.0)
        seconds = self.clock.seconds
        busy = self.device_seconds
        if busy is None:
            busy = seconds.get("prefill", 0.0) + seconds.get("decode", 0.0)
        return {
            "rows": self.totals.rows,
            "error_rows": self.totals.error_rows,
            "prompt_tokens": self.totals.prompt_tokens,
            "completion_tokens": self.totals.completion_tokens,
            "shared_prompt_tokens": self.stats.shared_tokens,
            "jump_forward_tokens": self.stats.jump_forward_tokens,
            "rows_guided": self.stats.rows_guided,
            "seconds": {stage: round(seconds.get(stage, 0.0), 3) for stage in _STAGES},
            "total_seconds": round(self.total_seconds, 3),
            "generate_seconds": round(generate, 3),
            "device_busy": round(min(1.0, busy / generate), 4) if generate > 0 else 0.0,
            "preempted": self.stats.preempted,
            "out_of_memory": self.stats.out_of_memory,
            "graphs_captured": self.stats.graphs_captured,
            "capture_seconds": round(self.stats.capture_seconds, 3),
            "kernels_compiled": self.stats.kernels_compiled,
            "compile_seconds": round(self.stats.compile_seconds, 3),
            "decode_steps": self.stats.decode_steps,
            "expert_tokens": self.stats.expert_tokens,
            "streamed_bytes": self.stats.streamed_bytes,
            "decode_streamed_bytes": self.stats.decode_streamed_bytes,
            "output_tokens_per_second": round(self.totals.completion_tokens / generate, 1) if generate > 0 else 0.0,
        }


@dataclass(frozen=True)
class Summary:
    """What the output holds, and the last run of each shard that wrote it."""

    output: Totals
    runs: Sequence[dict[str, Any]]  # RunStatistics.as_json of each shard
    errors: ErrorReasons = field(default_factory=ErrorReasons)

    def as_json(self) -> dict[str, Any]:
        """Counts are those of the output. Of several shards, stage seconds add up and `generate_seconds` is the longest."""
        return asdict(self.output) | {
            "seconds": {stage: round(sum(run["seconds"][stage] for run in self.runs), 3) for stage in _STAGES},
            "total_seconds": max((run["total_seconds"] for run in self.runs), default=0.0),
            "generate_seconds": max((run["generate_seconds"] for run in self.runs), default=0.0),
            "device_busy": round(self._device_busy(), 4),
            "out_of_memory": sum(run["out_of_memory"] for run in self.runs),
            "jump_forward_tokens": self._jump_forward_tokens(),
            "streamed_bytes": sum(run["streamed_bytes"] for run in self.runs),
            "decode_streamed_bytes": sum(run["decode_streamed_bytes"] for run in self.runs),
            "output_tokens_per_second": round(sum(run["output_tokens_per_second"] for run in self.runs), 1),
            "errors": self.errors.as_json(),
            "runs": list(self.runs),
        }

    def _jump_forward_tokens(self) -> int:
        """Of guided rows, appended without a decode step of their own."""
        return sum(run.get("jump_forward_tokens", 0) for run in self.runs)  # runs before there were any lack the key

    def _device_busy(self) -> float:
        """Share of the time between first prefill and last token, of all shards."""
        seconds = sum(run["generate_seconds"] for run in self.runs)
        return sum(run["device_busy"] * run["generate_seconds"] for run in self.runs) / seconds if seconds else 0.0

    def write(self, storage: Storage, name: str) -> None:
        """As JSON, atomically."""
        write_json(storage, name, self.as_json())

    def text(self) -> str:
        """What a person wants to know at the end."""
        output, whole = self.output, self.as_json()
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(output.finish_reasons.items()))
        now = sum(run["rows"] for run in self.runs)
        earlier = f", {output.rows - now:,} of them from earlier runs" if now < output.rows else ""
        samples = f", {output.samples:,} samples" if output.samples != output.rows else ""
        forced = self._jump_forward_tokens()
        skipped = f" ({forced:,} of them forced, without a decode step)" if forced else ""
        stages = ", ".join(f"{stage} {whole['seconds'][stage]:.1f} s" for stage in _STAGES)
        decode = max(whole["seconds"]["decode"], 1e-3)
        streamed = (
            f"; {whole['streamed_bytes'] / 1e9:,.1f} GB streamed to the GPU,"
            f" in decode {whole['decode_streamed_bytes'] / decode / 1e9:.1f} GB/s"
        )
        errors = [f"{output.error_rows:,} of {output.rows:,} rows have an error; by reason, with an example:",
                  *reason_lines(self.errors.most_common())] if output.error_rows else []  # fmt: skip
        return "\n".join(
            [
                f"{output.rows:,} rows{earlier}{samples} ({reasons}), {output.prompt_tokens:,} prompt tokens,"
                f" {output.completion_tokens:,} completion tokens{skipped}",
                f"took {duration(whole['total_seconds'])}; generating {whole['generate_seconds']:.1f} s,"
                f" {whole['output_tokens_per_second']:,.0f} output tokens/s, device busy {whole['device_busy']:.1%}",
                f"{stages} (read, tokenise and write run beside the others)" + streamed * bool(whole["streamed_bytes"]),
                *errors,
            ]
        )
