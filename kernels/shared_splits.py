"""Which splits of their context rows have in common, so that decode attention reads each once for all of them.

Rows share blocks from their beginning on, as a prefix cache gives them out: rows with the same block have the same
blocks before it. So the block that a split ends in tells which rows have the split in common.

Legend: B rows, H heads, G kv heads, R = H / G, W blocks per table row.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchmix.kernels.launch import next_power_of_2

SPLIT = 256  # tokens; bits depend on it. Untuned
_SHARED_TILE = 32  # (row, head) pairs that attend to a shared split together, unless R is larger


class SharedSplits(NamedTuple):
    """Items of rows that attend to a split together."""

    rows: Tensor  # int32 [M, rows per tile]; -1 where there are fewer
    split: Tensor  # int32 [M]
    first_own: Tensor  # int32 [B]: splits of each row before its first own one, all of them in the list

    def to(self, device: torch.device) -> SharedSplits:
        return SharedSplits(*(tensor.to(device, non_blocking=True) for tensor in self))


def pair_tile(ratio: int) -> int:
    """(row, head) pairs of an item, where a kv head has `ratio` heads."""
    return max(_SHARED_TILE, int(next_power_of_2(ratio)))


def find_shared_splits(
    block_table: Tensor, context: Tensor, block_size: int, ratio: int, capacity: int | None = None
) -> SharedSplits:
    """The leading splits whose blocks at least two rows have in common.

    block_table integers [B, W] and context integers [B], both on the CPU; ratio: H / G -> tensors on the CPU. What is
    found stays right while rows only grow. With `capacity`, as a CUDA graph needs it, there are that many items, the
    last ones of no rows; splits for which there is no room are left to the rows themselves.
    """
    rows_per_tile = pair_tile(ratio) // ratio
    table, whole = np.asarray(block_table), np.asarray(context) // SPLIT  # splits that each row has in full
    last = [-(-end // block_size) - 1 for end in range(SPLIT, SPLIT * (whole.max(initial=0) + 1), SPLIT)]  # its column
    tiles: list[np.ndarray] = []  # of each split
    first_own = np.zeros(len(whole), np.int32)
    rows, room = np.arange(len(whole)), sys.maxsize if capacity is None else capacity
    while len(rows := rows[whole[rows] > len(tiles)]):
        split = len(tiles)
        block = table[rows, last[split]]
        rows, block = rows[shared := np.bincount(block)[block] > 1], block[shared]
        if not len(rows):
            break
        order = block.argsort(kind="stable")
        rows, block = rows[order], block[order]  # those of a group stand together
        start = np.flatnonzero(np.append(True, block[1:] != block[:-1]))  # of each group
        sizes = np.diff(start, append=len(rows))
        needed = -(-sizes // rows_per_tile)  # tiles of each group
        tile = np.full(int(needed.sum()) * rows_per_tile, -1, np.int32)
        first = (needed.cumsum() - needed) * rows_per_tile
        tile[np.arange(len(rows)) + np.repeat(first - start, sizes)] = rows
        # The same groups may have the following splits in common, too.
        count = min(_count_alike(table, rows, last[split : int(whole[rows].min())]), room // int(needed.sum()))
        if not count:
            break
        tiles += [tile.reshape(-1, rows_per_tile)] * count
        room -= count * int(needed.sum())
        first_own[rows] = len(tiles)
    lengths = list(map(len, tiles))
    items = sum(lengths) if capacity is None else capacity
    found, numbers = np.full((items, rows_per_tile), -1, np.int32), np.zeros(items, np.int32)
    if tiles:
        found[: sum(lengths)], numbers[: sum(lengths)] = np.concatenate(tiles), np.repeat(range(len(tiles)), lengths)
    return SharedSplits(*map(torch.from_numpy, (found, numbers, first_own)))


def _count_alike(table: np.ndarray, rows: np.ndarray, columns: Sequence[int]) -> int:
    """In how many columns, from the first on, a row has the block of the row before it just where it does in the first.
    What two rows have in common in a column they have in common in those before, so half of the columns at a time."""

    def alike(column: int) -> np.ndarray:
        block = table[rows, column]
        found: np.ndarray = block[1:] == block[:-1]
        return found

    first = alike(columns[0])
    return bisect_left(columns, True, lo=1, key=lambda column: not np.array_equal(alike(column), first))
