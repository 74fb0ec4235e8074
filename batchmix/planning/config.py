"""The keys of `plan`."""

from __future__ import annotations

from dataclasses import dataclass

from batchmix.config_key import key


@dataclass
class PlanConfig:
    """What `batchmix plan` estimates for."""

    gpu: str = key("h200", "the GPU: a name in batchmix/planning/gpus.py")
    histogram: str | None = key(
        None,
        "file for a picture of the lengths, .svg or .html; null: .batchmix/lengths.svg in output.dir where that is set, else none",
    )
    expected_tokens: int | None = key(None, "tokens of an answer to assume; null: sampling.max_tokens")
    sample_rows: int | None = key(50_000, "rows to tokenise, evenly spaced, for an estimate of all; null: every row")
    dollars_per_hour: float | None = key(None, "price of one card; null: no cost is shown")
    deadline_hours: float | None = key(
        None, "print how many cards finish the run within so many hours; null: print the hours of one copy"
    )
    host_memory_gb: float | None = key(None, "memory of the GPU's machine; null: as much as this machine has")
