"""The prefix cache against rows that remember what their blocks hold."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batchmix.engine.block_manager import BlockPool, PrefixCache

SIZE = 2


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10_000), st.integers(8, 30))
def test_a_found_block_holds_what_the_prompt_begins_with(seed: int, num_blocks: int) -> None:
    """Rows start and end in any order, blocks are short: what `lookup` gives was computed for the same beginning, and
    the blocks that no row reads are counted right after every operation."""
    source = random.Random(seed)
    pool = BlockPool(num_blocks)
    cache = PrefixCache(pool, SIZE)
    holds: dict[int, tuple[int, ...]] = {}  # block -> all tokens from the beginning to its end
    rows: list[list[int]] = []
    reused = 0
    for _ in range(60):
        read = {block for row in rows for block in row}
        assert pool.num_only_kept == len(set(cache._blocks.values()) - read)
        if rows and source.random() < 0.4:
            pool.release(rows.pop(source.randrange(len(rows))))
            continue
        ids = [source.randint(0, 1) for _ in range(source.randint(1, 10))]
        shared = source.randrange(0, len(ids)) // SIZE * SIZE
        blocks = cache.lookup(ids, shared)
        for place, block in enumerate(blocks):
            assert holds[block] == tuple(ids[: (place + 1) * SIZE])
        reused += len(blocks)
        needed = -(-len(ids) // SIZE) - len(blocks)
        cache.release(needed - pool.num_free)
        if needed > pool.num_free:
            pool.release(blocks)
            continue
        own = pool.take(needed)
        for place, block in enumerate(own, start=len(blocks)):
            holds[block] = tuple(ids[: (place + 1) * SIZE])
        cache.keep(ids, shared, blocks + own)
        rows.append(blocks + own)
        assert pool.num_used == len({block for row in rows for block in row} | set(cache._blocks.values()))
    for row in rows:
        pool.release(row)
    assert pool.num_only_kept == len(cache) == pool.num_used
    cache.release(len(cache))
    assert pool.num_used == 0


def test_the_least_recently_used_goes_first_and_the_end_of_a_chain_before_its_start() -> None:
    pool = BlockPool(10)
    cache = PrefixCache(pool, SIZE)
    old, new = [1, 1, 2, 2, 3, 3, 9], [5, 5, 6, 6, 9]
    for ids in (old, new):
        blocks = pool.take(len(ids) // SIZE)
        cache.keep(ids, len(ids) // SIZE * SIZE, blocks)
        pool.release(blocks)
    cache.release(1)
    assert [len(cache.lookup(ids, 6)) for ids in (old, new)] == [2, 2]
    for ids in (old, new):
        found = cache.lookup(ids, 6)
        pool.release(found)
        pool.release(found)  # what the line before the loop took
    cache.release(2)
    assert [len(cache.lookup(ids, 6)) for ids in (old, new)] == [0, 2]


def test_blocks_that_rows_read_stay() -> None:
    pool = BlockPool(10)
    cache = PrefixCache(pool, SIZE)
    blocks = pool.take(2)
    cache.keep([1, 1, 2, 2, 3], 4, blocks)
    cache.release(9)
    assert cache.lookup([1, 1, 2, 2, 8], 4) == blocks
    assert cache.lookup([1, 1, 3, 2, 8], 4) == blocks[:1]
    assert cache.lookup([1, 1, 2, 2, 8], 0) == []


class CountedPrefixCache(RuleBasedStateMachine):
    """The count of unread blocks against a recount, after any sequence of what pool and cache can be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.cache = PrefixCache(self.pool, SIZE)
        self.rows: list[list[int]] = []

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=9), shared=st.integers(0, 9))
    def start(self, ids: list[int], shared: int) -> None:
        shared = min(shared, len(ids) - 1)
        blocks = self.cache.lookup(ids, shared)
        needed = -(-len(ids) // SIZE) - len(blocks)
        self.cache.release(needed - self.pool.num_free)
        if needed > self.pool.num_free:
            self.pool.release(blocks)
            return
        blocks += self.pool.take(needed)
        self.cache.keep(ids, shared, blocks)
        self.rows.append(blocks)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.pool.release(self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1))))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def another_sample(self, data: st.DataObject) -> None:
        blocks = list(data.draw(st.sampled_from(self.rows)))
        self.pool.share(blocks)
        self.rows.append(blocks)

    @rule(count=st.integers(0, 12))
    def make_room(self, count: int) -> None:
        self.cache.release(count)

    @invariant()
    def count_is_recount(self) -> None:
        read = {block for row in self.rows for block in row}
        kept = set(self.cache._blocks.values())
        assert self.pool.num_only_kept == len(kept - read)
        assert self.pool.num_used == len(kept | read)


CountedPrefixCache.TestCase.settings = settings(deadline=None, max_examples=30, stateful_step_count=40)
test_the_count_of_unread_blocks_is_their_recount = CountedPrefixCache.TestCase
