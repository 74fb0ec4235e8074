"""The KV blocks of what prompts begin with in common: computed once, then read by every row that begins so.

A block is known by the block before it and by its own tokens, so blocks form chains from a prompt's beginning. The cache
holds a reference to each of its blocks, so they outlive the row that computed them. When blocks run out, those that no
row reads go first, the end of a chain before its start.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from batchmix.engine.kv_cache import SCRATCH_BLOCK, BlockPool


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
        """The blocks there are for the first `shared_tokens` tokens, in order; the caller gets a reference to each."""
        found: list[int] = []
        keys = []
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
        keys = []
        before = SCRATCH_BLOCK
        for tokens, block in zip(self._tokens(token_ids, shared_tokens), blocks, strict=False):
            key = (before, tokens)
            if key not in self._blocks:
                self._blocks[key] = block
                self._pool.keep(block)
            keys.append(key)
            before = block
        self._touch(keys)

    def num_unused(self) -> int:
        """Blocks that no row reads, which `release` could free."""
        return self._pool.num_only_kept

    def release(self, count: int) -> None:
        """Free up to `count` blocks that no row reads."""
        if count <= 0:
            return
        for key, block in list(self._blocks.items()):
            if count == 0:
                return
            if self._pool.is_only_kept(block):
                del self._blocks[key]
                self._pool.drop(block)
                count -= 1

    def _tokens(self, token_ids: Sequence[int], shared_tokens: int) -> list[bytes]:
        size = self._size
        return [
            array("i", token_ids[low : low + size]).tobytes() for low in range(0, shared_tokens // size * size, size)
        ]

    def _touch(self, keys: list[tuple[int, bytes]]) -> None:
        for key in reversed(keys):
            self._blocks.move_to_end(key)
