"""The splits that rows share against their definition, row by row."""

from __future__ import annotations

from collections import defaultdict

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.kernels.shared_splits import SPLIT, find_shared_splits, pair_tile

# Of each row: the row before it that it begins like, for how many tokens, and how many tokens it has.
ROWS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 6 * SPLIT), st.integers(0, 6 * SPLIT)), min_size=1, max_size=24
)


def block_table(rows: list[tuple[int, int, int]], size: int) -> torch.Tensor:
    """Blocks as a prefix cache gives them out: whole ones, from the beginning on, of a row before."""
    table, unused = torch.zeros(len(rows), -(-6 * SPLIT // size) + 1, dtype=torch.int32), 1
    for row, (parent, shared, length) in enumerate(rows):
        common = min(shared, length, rows[parent % row][2]) // size if row else 0
        table[row, :common] = table[parent % row, :common] if row else 0
        own = -(-length // size) - common
        table[row, common : common + own] = torch.arange(unused, unused + own)
        unused += own
    return table


def groups(table: torch.Tensor, lengths: list[int], size: int) -> list[set[frozenset[int]]]:
    """By split: the groups of two rows and more that have in common all blocks up to its end."""
    found = list[set[frozenset[int]]]()
    for split in range(6):
        rows = defaultdict(set)
        for row, length in enumerate(lengths):
            if length >= (split + 1) * SPLIT:
                rows[tuple(table[row, : -(-(split + 1) * SPLIT // size)].tolist())].add(row)
        found.append({frozenset(group) for group in rows.values() if len(group) > 1})
    return found


@settings(deadline=None, max_examples=300)
@given(ROWS, st.sampled_from([16, 48, 64, 256, 512]), st.sampled_from([1, 4, 16]), st.none() | st.integers(0, 40))
def test_every_split_that_rows_share_is_listed_once(rows, size, ratio, capacity):
    table, lengths = block_table(rows, size), [length for *_, length in rows]
    shared = find_shared_splits(table, torch.tensor(lengths), size, ratio, capacity)
    per_tile, expected, room = pair_tile(ratio) // ratio, groups(table, lengths, size), capacity
    first_own = [0] * len(rows)
    for split, of_split in enumerate(expected):
        listed = [
            [row for row in item if row >= 0]
            for number, item in zip(shared.split.tolist(), shared.rows.tolist(), strict=True)
            if number == split and item[0] >= 0  # the kernel skips an item by its first row
        ]
        needed = sum(-(-len(group) // per_tile) for group in of_split)
        if room is not None:
            if needed > room:
                of_split, needed, room = set(), 0, 0
            room -= needed
        assert len(listed) == needed
        assert sorted(row for item in listed for row in item) == sorted(row for group in of_split for row in group)
        assert all(any(set(item) <= group for group in of_split) for item in listed)
        for row in {row for group in of_split for row in group}:
            first_own[row] = split + 1
    assert shared.first_own.tolist() == first_own
    assert capacity is None or len(shared.rows) == len(shared.split) == capacity
    assert int((shared.rows >= 0).sum()) == sum(first_own), "no other row in any item"


def test_what_is_shared_is_found():
    table = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 9], [5, 6, 10, 11], [1, 2, 3, 12], [0, 0, 0, 0]])
    context = torch.tensor([4 * SPLIT, 4 * SPLIT, 3 * SPLIT + 1, 4 * SPLIT, 2 * SPLIT + 1, 0])
    shared = find_shared_splits(table, context, SPLIT, 16)
    found = sorted(zip(shared.split.tolist(), shared.rows.tolist(), strict=True))
    # The last row of the first prefix has begun its third split only: its rest is not there yet.
    assert found == [(0, [0, 2]), (0, [1, 3]), (0, [4, -1]), (1, [0, 2]), (1, [1, 3]), (1, [4, -1]), (2, [0, 2])]
    assert shared.first_own.tolist() == [3, 2, 3, 2, 2, 0]

    more = find_shared_splits(table, context, SPLIT, 16, capacity=9)
    assert sorted(zip(more.split.tolist(), more.rows.tolist(), strict=True)) == sorted([*found, *[(0, [-1, -1])] * 2])
    fewer = find_shared_splits(table, context, SPLIT, 16, capacity=4)
    found = sorted(zip(fewer.split.tolist(), fewer.rows.tolist(), strict=True))
    assert found == [(0, [-1, -1]), (0, [0, 2]), (0, [1, 3]), (0, [4, -1])], "no room for the whole next split"
    assert fewer.first_own.tolist() == [1, 1, 1, 1, 1, 0]
