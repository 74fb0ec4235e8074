"""Which waiting prompts start, and when: a slot and KV blocks for each."""

from __future__ import annotations

import numpy as np

from batchmix.engine.state import Admission, State, Waiting


def worth_refilling(state: State) -> bool:
    """Whether enough slots are free that a prefill step runs well: an eighth of them, or all that still run."""
    free = state.slots.capacity - len(state.rows)
    return (
        bool(state.waiting)
        and (free >= max(1, state.slots.capacity // 8) or not state.rows)
        and _fits(state, state.waiting[0])
    )


def _fits(state: State, waiting: Waiting) -> bool:
    """Whether the next prompt finds a slot, and blocks for itself and for what the running rows will likely need."""
    slots, active = state.slots, len(state.rows)
    if active >= slots.capacity:
        return False
    if not active:
        return True
    size = state.cache.block_size
    expected = state.mean_length or 64.0
    needed = len(waiting.prompt.token_ids) + min(expected, waiting.prompt.sampling.max_tokens)
    generated = slots.planned[:active]
    limit = np.minimum(np.maximum(expected, 2.0 * generated), slots.host["max_tokens"][:active])
    reserve = float(np.maximum(limit - generated, 0).sum())
    needed += reserve + size * (active + 1)
    return state.pool.num_free * size >= needed or state.num_available() * size >= needed


def admit(state: State) -> None:
    """Take prompts out of `state.waiting` and blocks for them, as `state.admissions`, while slots and blocks are free."""
    size, pool, prefixes = state.cache.block_size, state.pool, state.prefixes
    slots_left = state.slots.capacity - len(state.rows)
    promised = 0  # blocks for further samples, taken when those start
    while state.waiting and slots_left and (not state.admissions or _fits(state, state.waiting[0])):
        waiting = state.waiting[0]
        prompt, samples = waiting.prompt, waiting.samples[:slots_left]
        shared = prefixes.lookup(prompt.token_ids, prompt.shared_tokens) if prefixes is not None else []
        num_blocks = -(-(len(prompt.token_ids) + 1) // size) - len(shared)
        available = state.num_available() - promised
        if num_blocks > available:
            pool.release(shared)
            break
        # Each further sample has a last block of its own.
        samples = samples[: 1 + available - num_blocks]
        promised += len(samples) - 1
        slots_left -= len(samples)
        blocks = shared + state.take(num_blocks)
        if prefixes is not None:  # from now on: prompts behind this one in the same prefill step may read them
            prefixes.keep(prompt.token_ids, prompt.shared_tokens, blocks)
        state.admissions.append(Admission(prompt, samples, blocks, len(shared) * size))
        state.stats.shared_tokens += len(shared) * size
        del waiting.samples[: len(samples)]
        if not waiting.samples:
            state.waiting.popleft()
