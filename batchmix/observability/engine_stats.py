"""What the engine counts while it runs; read by progress and metrics from another thread, never locked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np


@dataclass
class EngineStats:
    """Totals since the start, and the state of the last step. Seconds, tokens, blocks; times are time.time()."""

    prompt_tokens: int = 0  # prefilled
    shared_tokens: int = 0  # of prompts, not prefilled because an earlier prompt begins alike
    completion_tokens: int = 0
    jump_forward_tokens: int = 0  # of guided rows, appended without a decode step of their own
    # By what follows them: a table; llguidance with our grammar, on the host; llguidance, which read the JSON Schema itself.
    rows_guided: dict[str, int] = field(default_factory=lambda: {"table": 0, "host": 0, "llguidance": 0})
    running: int = 0  # rows in the last decode step
    waiting: int = 0  # prompts in the engine without a slot
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    refills: int = 0  # prefills of rows that took the slots of others, while more still ran
    preempted: int = 0  # rows that gave way when blocks ran out, and started again
    streamed_bytes: int = 0  # weights, keys and values that were copied to the device
    decode_streamed_bytes: int = 0  # of them, in decode steps
    graphs_captured: int = 0  # CUDA graphs of decode steps
    graphs_replayed: int = 0
    capture_seconds: float = 0.0  # of the host, in which the device has work as long as it lasts
    kernels_compiled: int = 0  # in the run itself: none where all were compiled before
    compile_seconds: float = 0.0  # for them
    decode_steps: dict[int, list[float]] | None = None  # by captured size: steps, and seconds of the device
    out_of_memory: int = 0  # steps that failed for want of memory; after each the batch is half as large
    first_prefill_time: float | None = None
    last_token_time: float | None = None
    expert_tokens: list[list[int]] | None = None  # [layers][experts] tokens that went there, read at the end of a run

    def at_rest(self) -> None:
        """Become those of an engine that has ended: it holds nothing any more."""
        self.running = self.waiting = self.kv_blocks_used = self.kv_blocks_total = 0

    def sum_up(self, others: Iterable[EngineStats]) -> None:
        """Become what several engines together are: counts and seconds added up, from the first time to the last."""
        others = list(others)
        for total in fields(self):
            values = [value for other in others if (value := getattr(other, total.name)) is not None]
            if values:
                setattr(self, total.name, _UNITE.get(total.name, sum)(values))


def _add_steps(tables: Iterable[dict[int, list[float]]]) -> dict[int, list[float]]:
    """Steps and seconds by size, added up."""
    tables = list(tables)
    sizes = sorted({size for table in tables for size in table})
    return {
        size: [sum(column) for column in zip(*(table[size] for table in tables if size in table), strict=True)]
        for size in sizes
    }


_UNITE: dict[str, Callable[[Any], Any]] = {
    "first_prefill_time": min, "last_token_time": max, "decode_steps": _add_steps,
    "rows_guided": lambda tables: {kind: sum(table[kind] for table in tables) for kind in tables[0]},
    "expert_tokens": lambda tables: np.sum(tables, axis=0).tolist(),
}  # fmt: skip
