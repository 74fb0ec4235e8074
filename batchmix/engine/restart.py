"""Out of memory in the middle of a run: go on with half the batch, and lose nothing."""

from __future__ import annotations

import logging

import torch

from batchmix.engine.state import State, Waiting
from batchmix.errors import BatchmixError

_log = logging.getLogger(__name__)


def retry_with_half_the_batch(state: State, step: str, least_tokens: int) -> None:
    """Put every row back and make the state anew for half as many. Rows run again and, keyed as they are, end the same.

    `step` names the one that failed; `least_tokens` are the fewest that a prefill step may be cut to.
    """
    capacity, batched = state.slots.capacity, state.max_num_batched_tokens
    if capacity == 1 and batched <= least_tokens:
        raise BatchmixError(
            "out of memory with one row at a time; lower engine.gpu_memory_utilization or model.max_model_len"
        )
    again: dict[int, Waiting] = {}
    running = [(row.prompt, row.sample) for row in sorted(state.rows, key=lambda row: row.order)]
    for prompt, sample in running + [(a.prompt, sample) for a in state.admissions for sample in a.samples]:
        waiting = again.setdefault(id(prompt), Waiting(prompt, []))
        if sample not in waiting.samples:
            waiting.samples.append(sample)
    state.waiting.extendleft(reversed(again.values()))
    state.max_num_batched_tokens = max(least_tokens, batched // 2)
    state.stats.completion_tokens -= int(state.slots.answers.count[: state.slots.num_active].sum())
    state.renew(max(1, capacity // 2))
    if state.cache.keys.is_cuda:
        torch.cuda.empty_cache()
    state.stats.out_of_memory += 1
    state.stats.running, state.stats.waiting = 0, len(state.waiting)
    _log.warning(
        "out of memory in a %s step: %d rows are put back; going on with %d rows at once (was %d) and %s prompt tokens"
        " in a step (was %s)", step, len(again), state.slots.capacity, capacity,
        f"{state.max_num_batched_tokens:,}", f"{batched:,}",
    )  # fmt: skip
