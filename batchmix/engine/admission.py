"""Which waiting prompts start, and when: a slot and KV blocks for each.

A decode step reads all weights once, whether or not its slots are full; a prefill step reads them once more, unless it
has so many tokens that arithmetic takes longer. Losses are counted in such reads:

- starting T tokens now, where `full_prefill` would be enough, loses 1 - T / full_prefill of one;
- not starting R rows beside A that run loses R / (R + A) of one in each decode step.

Rows start once waiting has lost as much as starting still would, so that neither loss is ever more than the other (as
in the ski-rental problem, at most twice what is lost by who knows when rows will end). No clock decides: ranks of a
tensor-parallel run come to the same.
"""

from __future__ import annotations

import numpy as np

from batchmix.engine.state import Admission, State
from batchmix.records import Prompt

_EXPECTED_TOKENS = 64.0  # of an answer, before there are any


class _Room:
    """Tokens of KV cache that are not spoken for, by running rows or by what they will likely grow to."""

    def __init__(self, state: State) -> None:
        self._size = state.cache.block_size
        self._shares_prefixes = state.prefixes is not None
        self._expected = state.mean_length or _EXPECTED_TOKENS
        active = len(state.rows)
        planned = state.slots.planned[:active]
        limit = np.minimum(np.maximum(self._expected, 2.0 * planned), state.slots.host["max_tokens"][:active])
        growth = float(np.maximum(limit - planned, 0).sum())
        self._tokens = state.num_available() * self._size - growth - self._size * active

    def own_tokens(self, prompt: Prompt) -> int:
        """The prompt's tokens that are likely not in the cache."""
        shared = prompt.shared_tokens // self._size * self._size if self._shares_prefixes else 0
        return len(prompt.token_ids) - shared

    def take(self, prompt: Prompt, samples: int) -> bool:
        """Speak for so many samples of a prompt, if there is room."""
        growth = min(self._expected, prompt.sampling.max_tokens) + self._size
        needed = self.own_tokens(prompt) + samples * growth
        if needed > self._tokens:
            return False
        self._tokens -= needed
        return True


def worth_refilling(state: State) -> bool:
    """Whether waiting prompts are to start now, rather than after the next window of decode steps."""
    rows, tokens = _startable(state)
    state.startable = rows
    if not state.rows:
        return bool(state.waiting)
    full = min(state.full_prefill, state.max_num_batched_tokens)
    return rows > 0 and tokens / full + state.idle_reads >= 1.0


def _startable(state: State) -> tuple[int, int]:
    """Rows and prompt tokens that find slots and blocks now; counted up to a full prefill step."""
    slots_left = state.slots.capacity - len(state.rows)
    if not slots_left or not state.waiting:
        return 0, 0
    room = _Room(state)
    rows = tokens = 0
    for waiting in state.waiting:
        samples = min(len(waiting.samples), slots_left - rows)
        if not samples or tokens >= state.full_prefill or not room.take(waiting.prompt, samples):
            break
        rows += samples
        tokens += room.own_tokens(waiting.prompt)
    return rows, tokens


def admit(state: State) -> bool:
    """Take prompts out of `state.waiting` and blocks for them, as `state.admissions`, while slots and blocks are free.

    Whether there are any: what `worth_refilling` took to be in the cache may not be there yet.
    """
    size, pool, prefixes = state.cache.block_size, state.pool, state.prefixes
    room = _Room(state)
    slots_left = state.slots.capacity - len(state.rows)
    promised = 0  # blocks for further samples, taken when those start
    while state.waiting and slots_left:
        waiting = state.waiting[0]
        prompt, samples = waiting.prompt, waiting.samples[:slots_left]
        alone = not state.rows and not state.admissions
        if not room.take(prompt, len(samples)) and not alone:
            break
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
    state.stats.waiting = len(state.waiting)
    return bool(state.admissions)
