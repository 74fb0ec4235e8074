"""`_summary.json`, and the lines at the end of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from batchmix.data.files import write_json
from batchmix.engine.stats import EngineStats
from batchmix.report.clock import StageClock
from batchmix.report.progress import duration
from batchmix.report.totals import Totals

_ORDER = ("read", "tokenise", "prefill", "decode", "write")


@dataclass(frozen=True)
class Summary:
    """What is in the output, and how the run that completed it went. Rates are of that run alone."""

    rows: int
    error_rows: int
    samples: int
    prompt_tokens: int
    completion_tokens: int
    finish_reasons: dict[str, int]
    run_rows: int
    run_prompt_tokens: int
    run_completion_tokens: int
    seconds: dict[str, float]  # by stage; read, tokenise and write run beside prefill and decode
    total_seconds: float
    generate_seconds: float  # from the first prefill to the last token
    output_tokens_per_second: float
    prompt_tokens_per_second: float

    def write(self, path: Path) -> None:
        """As JSON, atomically."""
        write_json(path, asdict(self))

    def text(self) -> str:
        """What a person wants to know at the end."""
        stages = ", ".join(f"{stage} {self.seconds[stage]:.1f} s" for stage in _ORDER)
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.finish_reasons.items()))
        earlier = f", {self.rows - self.run_rows:,} of them in earlier runs" if self.rows != self.run_rows else ""
        return "\n".join(
            [
                f"{self.rows:,} rows{earlier}; {self.error_rows:,} with errors; finish reasons: {reasons or 'none'}",
                f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens",
                f"this run took {duration(self.total_seconds)}, generating {self.generate_seconds:.1f} s of it: "
                f"{self.prompt_tokens_per_second:,.0f} prompt and {self.output_tokens_per_second:,.0f} output tokens/s",
                f"{stages} (read, tokenise and write run beside the others)",
            ]
        )


def summarize(
    output: Totals, run: Totals, stats: EngineStats, clock: StageClock, total_seconds: float
) -> Summary:
    """`output`: what the folder holds; the others: of this run."""
    generate = (stats.last_token_time or 0.0) - (stats.first_prefill_time or 0.0)
    measured = clock.seconds | {"prefill": stats.prefill_seconds, "decode": stats.decode_seconds}
    return Summary(
        **asdict(output),
        run_rows=run.rows,
        run_prompt_tokens=run.prompt_tokens,
        run_completion_tokens=run.completion_tokens,
        seconds={stage: round(measured.get(stage, 0.0), 3) for stage in _ORDER},
        total_seconds=round(total_seconds, 3),
        generate_seconds=round(generate, 3),
        output_tokens_per_second=round(run.completion_tokens / generate, 1) if generate > 0 else 0.0,
        prompt_tokens_per_second=round(run.prompt_tokens / generate, 1) if generate > 0 else 0.0,
    )
