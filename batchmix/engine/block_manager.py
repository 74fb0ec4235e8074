"""Which KV blocks are free, and which hold what prompts begin with in common.

A block of a prefix is known by the block before it and by its own tokens. The prefix cache holds it, so it outlives its
row. When blocks run out, those that no row reads go first, the end of a chain before its start.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

import numpy as np

from batchmix.models.kv_cache import SCRATCH_BLOCK


class BlockPool:
    """Who holds each block: rows, and the prefix cache. Low numbers go first, so that those in use stay dense."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(1, num_blocks))  # a heap; block 0 is SCRATCH_BLOCK
        self._num_readers = np.zeros(num_blocks, np.int32)  # rows that hold each block
        self._kept = np.zeros(num_blocks, np.bool_)  # by the prefix cache
        self.num_only_kept = 0  # blocks that no row reads, which `PrefixCache.release` could free
        self.num_blocks = num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` of the free blocks, for one row."""
        assert count <= len(self._free), count
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        self._num_readers[blocks] = 1
        return blocks

    def share(self, blocks: list[int]) -> None:
        """One row more holds each."""
        self.num_only_kept -= int(np.count_nonzero(self._num_readers[blocks] == 0))
        self._num_readers[blocks] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One row less holds each; those that nobody holds are free again."""
        held = np.array(blocks, np.int64)
        self._num_readers[held] -= 1
        unread = held[self._num_readers[held] == 0]
        kept = self._kept[unread]
        self.num_only_kept += int(np.count_nonzero(kept))
        for block in unread[~kept].tolist():
            heapq.heappush(self._free, block)

    def keep(self, block: int) -> None:
        """Let the prefix cache hold a block that a row holds."""
        self._kept[block] = True

    def drop(self, block: int) -> None:
        """Free a block that only the prefix cache holds."""
        self._kept[block] = False
        self.num_only_kept -= 1
        heapq.heappush(self._free, block)

    def is_only_kept(self, block: int) -> bool:
        """Whether only the prefix cache holds the block."""
        return bool(self._kept[block]) and self._num_readers[block] == 0


class PrefixCache:
    """Which blocks hold which beginnings."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._size = block_size
        # (the block before, the tokens) -> block; least recently used first, and a block always after those that it
        # leads to: were it to go before them, another chain could get its number and seem to lead to them.
        self._blocks: OrderedDict[tuple[int, bytes], int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def lookup(self, token_ids: Sequence[int], shared_tokens: int) -> list[int]:
        """The blocks there are for the first `shared_tokens` tokens, in order; one row more holds each."""
        keys: list[tuple[int, bytes]] = []
        found: list[int] = []
        for tokens in self._tokens(token_ids, shared_tokens):
            key = (found[-1] if found else SCRATCH_BLOCK, tokens)
            if key not in self._blocks:
                break
            keys.append(key)
            found.append(self._blocks[key])
        self._touch(keys)
        self._pool.share(found)
        return found

    def keep(self, token_ids: Sequence[int], shared_tokens: int, blocks: Sequence[int]) -> None:
        """Remember a row's blocks of its first `shared_tokens` tokens; `blocks` begin with what `lookup` gave."""
        keys = list(zip((SCRATCH_BLOCK, *blocks), self._tokens(token_ids, shared_tokens), strict=False))
        for key, block in zip(keys, blocks, strict=False):
            if key not in self._blocks:
                self._blocks[key] = block
                self._pool.keep(block)
        self._touch(keys)

    def release(self, count: int) -> None:
        """Free up to `count` blocks that no row reads."""
        unread = ((key, block) for key, block in self._blocks.items() if self._pool.is_only_kept(block))
        for key, block in list(islice(unread, max(0, count))):
            del self._blocks[key]
            self._pool.drop(block)

    def _tokens(self, token_ids: Sequence[int], shared_tokens: int) -> list[bytes]:
        size = self._size
        ends = range(size, shared_tokens + 1, size)  # of whole blocks
        return [array("i", token_ids[end - size : end]).tobytes() for end in ends]

    def _touch(self, keys: list[tuple[int, bytes]]) -> None:
        for key in reversed(keys):
            self._blocks.move_to_end(key)
