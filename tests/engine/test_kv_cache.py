"""The pool of KV blocks never hands out a block that somebody holds, and gets all of them back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.engine.block_manager import BlockPool
from batchmix.models.kv_cache import SCRATCH_BLOCK


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 20), st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 8))))
def test_references_are_counted(num_blocks, steps):
    pool = BlockPool(num_blocks)
    holders: list[list[int]] = []
    for action, number in steps:
        held = {block for blocks in holders for block in blocks}
        if action == "take":
            assert pool.num_free == num_blocks - 1 - len(held)
            if number > pool.num_free:
                with pytest.raises(AssertionError):
                    pool.take(number)
                continue
            taken = pool.take(number)
            assert len(set(taken)) == number
            assert not held & set(taken)
            assert SCRATCH_BLOCK not in taken
            holders.append(taken)
        elif holders and action == "share":
            pool.share(holders[number % len(holders)])
            holders.append(list(holders[number % len(holders)]))
        elif holders:
            pool.release(holders.pop(number % len(holders)))
        held = {block for blocks in holders for block in blocks}
        assert pool.num_used == len(held)
        assert pool.num_free == num_blocks - 1 - len(held)
    for blocks in holders:
        pool.release(blocks)
    assert sorted(pool.take(num_blocks - 1)) == list(range(1, num_blocks))
