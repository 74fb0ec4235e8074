"""What the engine counts while it runs; read by progress and metrics from another thread, never locked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Totals since the start, and the state of the last step. Seconds, tokens, blocks; times are time.time()."""

    prompt_tokens: int = 0  # prefilled
    shared_tokens: int = 0  # of prompts, not prefilled because an earlier prompt begins alike
    completion_tokens: int = 0
    running: int = 0  # rows in the last decode step
    waiting: int = 0  # prompts in the engine without a slot
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    out_of_memory: int = 0  # steps that failed for want of memory; after each the batch is half as large
    first_prefill_time: float | None = None
    last_token_time: float | None = None
