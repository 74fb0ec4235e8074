"""The paged KV cache: blocks of tokens, handed out as rows grow, shared where rows have the same prompt."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from batchmix.model.config import MixtralConfig
from batchmix.model.quantized import FP8, fp8_values

if TYPE_CHECKING:
    from batchmix.engine.forced import Lanes
    from batchmix.engine.slots import InputBatch
    from batchmix.model.backend import Attend, Chunk

_E4M3_MAX = 448.0
BLOCK_SIZE = 64  # tokens; decode's batched products run fastest on CPU at 32 to 64
SCRATCH_BLOCK = 0  # where padding tokens write; no row ever owns it


class KVCache:
    """Keys and values of every layer, [layers, blocks, G, block_size, C] each.

    The layout puts one kv head's keys of a block next to each other, so that attention reads them as one dense
    matrix without a copy. The scales of a cache of float8_e4m3fn are 1, as vLLM's where a checkpoint brings none:
    values are rounded as they are, and cut off at ±448.
    """

    def __init__(
        self, config: MixtralConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, num_blocks, config.num_key_value_heads, block_size, config.head_dim)
        self._hold(_zeros(shape, dtype, device), _zeros(shape, dtype, device))

    @property
    def streamed_bytes(self) -> int:
        """Copied to the device so far."""
        return 0

    def _hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values
        ones = torch.ones(1, device=keys.device)
        self.scales = (ones, ones) if keys.dtype == FP8 else (None, None)  # of keys, of values
        _, self.num_blocks, _, self.block_size, _ = keys.shape

    @staticmethod
    def block_bytes(config: MixtralConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        return per_token * block_size

    def write(self, layer: int, blocks: torch.Tensor, offsets: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k and v [T, G, C] at (block, offset), int64 [T] each."""
        keys, values = self.layer(layer)
        words(keys)[blocks, :, offsets] = words(self._narrow(k))
        words(values)[blocks, :, offsets] = words(self._narrow(v))

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys and values, on the device."""
        return self.keys[layer], self.values[layer]

    def around_prefill(self, attend: Attend, chunks: Sequence[Chunk]) -> Attend:
        """`attend`, and around it whatever the cache does to have each layer there."""
        return attend

    def around_decode(self, attend: Attend, slots: InputBatch | Lanes, rows: int) -> Attend:
        """Likewise, of a step in which slots 0..rows-1 get one more token."""
        return attend

    def as_stored(self, x: torch.Tensor) -> torch.Tensor:
        """x as it will be read from the cache, in its own dtype."""
        return x if self.keys.dtype == x.dtype else self._narrow(x).to(x.dtype)

    def read(self, cached: torch.Tensor, blocks: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
        """Blocks of one layer's keys or values [blocks, G, S, C], as `dtype`."""
        stored = words(cached)[blocks].view(cached.dtype)
        return fp8_values(stored).to(dtype) if cached.dtype == FP8 else stored

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        """x in the cache's dtype, cut off at what fp8 can hold: its cast would give NaN."""
        return (x.clamp(-_E4M3_MAX, _E4M3_MAX) if self.keys.dtype == FP8 else x).to(self.keys.dtype)

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block over all layers."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


def words(tensor: torch.Tensor) -> torch.Tensor:
    """Of float8 its bytes: torch indexes few things of float8."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, since scores over stale memory have to be finite. On the CPU memory is only taken where it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for."""


class BlockPool:
    """Which blocks are free. Blocks are counted references, and low numbers go first so that those in use stay dense.

    A prefix cache's reference is told from a row's, so that blocks that only it holds are counted as they come and go.
    """

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(1, num_blocks))  # a heap; block 0 is SCRATCH_BLOCK
        self._references = np.zeros(num_blocks, np.int32)
        self._kept = np.zeros(num_blocks, np.bool_)  # one of the references is the prefix cache's
        self.num_only_kept = 0  # blocks that no row holds
        self.num_blocks = num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks with one reference each; OutOfBlocks, and none taken, if fewer are free."""
        if count > len(self._free):
            raise OutOfBlocks
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        self._references[blocks] = 1
        return blocks

    def share(self, blocks: list[int]) -> None:
        """One more reference to each."""
        self.num_only_kept -= self._count_only_kept(blocks)
        self._references[blocks] += 1

    def release(self, blocks: list[int]) -> None:
        """One reference less to each; those with none left are free again."""
        self._references[blocks] -= 1
        self.num_only_kept += self._count_only_kept(blocks)
        for block in blocks:
            if self._references[block] == 0:
                heapq.heappush(self._free, block)

    def keep(self, block: int) -> None:
        """The prefix cache's reference to a block that a row holds."""
        self.share([block])
        self._kept[block] = True

    def drop(self, block: int) -> None:
        """Give up the prefix cache's reference to a block that no row holds: it is free again."""
        self._kept[block] = False
        self.num_only_kept -= 1
        self.release([block])

    def is_only_kept(self, block: int) -> bool:
        """Whether the prefix cache alone holds the block."""
        return bool(self._kept[block]) and int(self._references[block]) == 1

    def _count_only_kept(self, blocks: list[int]) -> int:
        return int(np.count_nonzero(self._kept[blocks] & (self._references[blocks] == 1)))
