"""A set of row ordinals as a bitmap: one bit a row, so that ten million done rows take 1.25 MB."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Skip(Protocol):
    """Rows to leave out."""

    def mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of the ordinals start..stop-1 to leave out, bool [stop - start]."""


class RowSet:
    """A growing set of non-negative row ordinals.

    >>> done = RowSet([3, 5])
    >>> 3 in done, 4 in done, len(done), list(done)
    (True, False, 2, [3, 5])
    >>> done.mask(2, 6)
    array([False,  True, False,  True])
    """

    def __init__(self, rows: Iterable[int] = ()) -> None:
        self._bits = np.zeros(1024, np.uint8)
        self.add_many(np.fromiter(rows, np.int64))

    def add_many(self, rows: npt.NDArray[np.int64]) -> None:
        """Add the ordinals in an int64 array of any length, repeated or not."""
        if not rows.size:
            return
        needed = int(rows.max()) // 8 + 1
        if needed > self._bits.size:
            self._bits = np.concatenate([self._bits, np.zeros(max(needed, self._bits.size), np.uint8)])
        np.bitwise_or.at(self._bits, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))

    def mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of the ordinals start..stop-1 are in the set, bool [stop - start]."""
        rows = np.arange(start, stop)
        inside = rows >> 3 < self._bits.size
        found = np.zeros(stop - start, bool)
        found[inside] = (self._bits[rows[inside] >> 3] >> (rows[inside] & 7)) & 1
        return found

    def num_of_shard(self, index: int, count: int) -> int:
        """How many of the ordinals have `row % count == index`."""
        return int(np.unpackbits(self._bits, bitorder="little")[index::count].sum())

    def __contains__(self, row: int) -> bool:
        byte = row >> 3
        return byte < self._bits.size and bool(self._bits[byte] >> (row & 7) & 1)

    def __len__(self) -> int:
        return int(np.bitwise_count(self._bits).sum())

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(np.unpackbits(self._bits, bitorder="little")).tolist())


class AllBut:
    """Every row but those that are `wanted` and not yet `done`: what a run that redoes rows skips."""

    def __init__(self, wanted: RowSet, done: RowSet) -> None:
        self._wanted, self._done = wanted, done

    def mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of the ordinals start..stop-1 are skipped, bool [stop - start]."""
        mask: npt.NDArray[np.bool_] = ~self._wanted.mask(start, stop) | self._done.mask(start, stop)
        return mask
