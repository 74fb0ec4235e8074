"""What the rows have generated, as far as the host has read it back."""

from __future__ import annotations

import numpy as np

from batchmix.models.backend import Logprobs
from batchmix.records import TokenLogprob


class OutputBuffers:
    """Arrays over the slots, the longer ones grown as rows grow."""

    def __init__(self, size: int) -> None:
        self.finish = np.zeros(size, np.int64)  # RUNNING, or why the row ended
        self.stop_reason = np.zeros(size, np.int64)
        self.count = np.zeros(size, np.int64)  # tokens of the row in `tokens`
        self.tokens = np.zeros((size, 64), np.int32)  # [slots, tokens so far]
        self.processed_logprobs = np.zeros((size, 0), np.float32)  # among the tokens that were allowed
        self.logprobs = np.zeros((size, 0), np.float32)
        self.ranks = np.zeros((size, 0), np.int32)
        self.top_ids = np.zeros((size, 0, 0), np.int32)  # [slots, tokens so far, most that a row asks for]
        self.top_logprobs = np.zeros((size, 0, 0), np.float32)

    def append(
        self, slots: np.ndarray, state: np.ndarray, ring: np.ndarray, processed_logprobs: np.ndarray | None = None
    ) -> int:
        """Take in what steps have done to slots int64 [N], -1 where the row is gone. Returns how many tokens are new.

        state int64 [3, N]: tokens generated, the n-th of which is in column n % L of ring [N, L]; finish; stop reason.
        Likewise a token's log-probability among those that were allowed in processed_logprobs float32 [N, L].
        """
        if (slots < 0).any():
            there = slots >= 0
            slots, state, ring = slots[there], state[:, there], ring[there]
            processed_logprobs = None if processed_logprobs is None else processed_logprobs[there]
        before = self.count[slots]
        new = state[0] - before
        steps = int(new.max(initial=0))
        self.tokens = _grow(self.tokens, int(before.max(initial=0)) + steps)
        # Of rows that have fewer new tokens, what is written beyond their count is overwritten later.
        place = before[:, None] + np.arange(steps)  # [N, steps]
        row, column = np.arange(len(slots))[:, None], place % ring.shape[1]
        self.tokens[slots[:, None], place] = ring[row, column]
        if processed_logprobs is not None:
            self.processed_logprobs = _grow(self.processed_logprobs, self.tokens.shape[1])
            self.processed_logprobs[slots[:, None], place] = processed_logprobs[row, column]
        self.count[slots], self.finish[slots], self.stop_reason[slots] = state
        return int(new.sum())

    def append_jump_forward(self, slot: int, tokens: list[int]) -> None:
        """Tokens that a row's grammar leaves no choice about."""
        count = int(self.count[slot])
        self.tokens = _grow(self.tokens, count + len(tokens))
        self.processed_logprobs[slot, count : count + len(tokens)] = 0.0
        self.tokens[slot, count : count + len(tokens)] = tokens
        self.count[slot] = count + len(tokens)

    def append_logprobs(self, logprobs: Logprobs, place: np.ndarray) -> None:
        """Of the token that is a row's number `place`, int64 [N]; waits for the device."""
        slots, length, k = logprobs.rows, int(place.max()) + 1, logprobs.top.shape[1]
        self.logprobs, self.ranks = _grow(self.logprobs, length), _grow(self.ranks, length)
        self.logprobs[slots, place] = logprobs.chosen.cpu().numpy()
        self.ranks[slots, place] = logprobs.ranks.cpu().numpy()
        self.top_ids, self.top_logprobs = _grow(self.top_ids, length, k), _grow(self.top_logprobs, length, k)
        self.top_ids[slots, place, :k] = logprobs.top_ids.cpu().numpy()
        self.top_logprobs[slots, place, :k] = logprobs.top.cpu().numpy()

    def row_logprobs(self, slot: int, num_top: int) -> list[TokenLogprob]:
        """The log-probabilities of one row's tokens so far, each with those of the `num_top` most likely ones."""
        count = int(self.count[slot])
        columns = [array[slot, :count].tolist() for array in (
            self.tokens, self.logprobs, self.ranks, self.top_ids[..., :num_top], self.top_logprobs[..., :num_top],
        )]  # fmt: skip
        return [
            TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)), rank)
            for token, logprob, rank, ids, values in zip(*columns, strict=True)
        ]


def _grow(log: np.ndarray, length: int, width: int = 0) -> np.ndarray:
    """`log` with room for `length` tokens along its second axis, else doubled, and for `width` values along a third."""
    extra = max(length, 2 * log.shape[1]) - log.shape[1] if length > log.shape[1] else 0
    wider = max(0, width - log.shape[2]) if log.ndim == 3 else 0
    return np.pad(log, ((0, 0), (0, extra), (0, wider))[: log.ndim]) if extra or wider else log
