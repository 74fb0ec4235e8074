"""A sample of a data set's rows, so that a plan for millions of rows takes seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchmix.input.rowset import AllBut, RowSet, Skip
from batchmix.input.source import Source


@dataclass(frozen=True)
class OneIn:
    """All rows of a shard but every `stride`-th, as rows to skip. `shards`: how many share the rows."""

    stride: int
    shards: int

    def mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of the ordinals start..stop-1 are skipped, bool [stop - start]."""
        skipped: npt.NDArray[np.bool_] = np.arange(start, stop) // self.shards % self.stride != 0
        return skipped


def sample(source: Source, most: int | None, shards: int) -> tuple[int | None, Skip]:
    """(rows of the shard, rows to skip): evenly spaced rows are left, at most `most`.

    Where the files' metadata does not tell how many rows there are, they are read once to be counted; no row is parsed
    for that. `most` None: nothing is skipped, and nothing counted.
    """
    if most is None:
        return source.shard_rows, RowSet()
    if source.shard_rows is None:
        for _ in source.rows(AllBut(RowSet(), RowSet())):  # sets num_rows
            pass
    total = source.shard_rows or 0
    stride = max(1, -(-total // most))
    return total, OneIn(stride, shards) if stride > 1 else RowSet()
