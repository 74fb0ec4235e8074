"""Random paged KV caches for the attention tests: NaN wherever no token lies, blocks in a random order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_checks import FP8, poison
from torch import Tensor

# (queries, cache): the dtypes of one case. bfloat16 over e4m3 runs its products in float16, so the interpreter does too.
HALF_PAIR = (torch.float16, torch.float16)
FP8_PAIR = (torch.bfloat16, FP8)


@dataclass
class Paged:
    """One layer of a cache and the rows in it."""

    keys: Tensor  # [blocks, G, S, C]
    values: Tensor
    block_table: Tensor  # int32 [B, W]; past a row's end 0, the scratch block
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        return self.k_scale, self.v_scale

    def moved(self, seed: int) -> Paged:
        """The same rows in other blocks of a larger pool."""
        blocks = len(self.keys)
        place = 1 + torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(seed))[:blocks]
        place = place.to(self.keys.device)
        place[0] = 0
        keys, values = (x.new_empty(2 * blocks + 1, *x.shape[1:]) for x in (self.keys, self.values))
        _poison(keys, values)
        for new, old in ((keys, self.keys), (values, self.values)):
            new.view(_bits(new))[place] = old.view(_bits(old))
        return Paged(keys, values, place[self.block_table.long()].int(), self.k_scale, self.v_scale)


def random_cache(
    lengths: list[int],
    kv_heads: int,
    dim: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    shared: list[tuple[list[int], int]] | None = None,
) -> Paged:
    """Rows of `lengths` tokens. shared: (rows, blocks): these rows have the first row's leading blocks in common."""
    source = torch.Generator().manual_seed(seed)
    needed = [-(-length // size) for length in lengths]
    blocks = (1 + torch.randperm(sum(needed), generator=source)).tolist()
    table = torch.zeros(len(lengths), max([1, *needed]) + 1, dtype=torch.int32)
    for row, count in enumerate(needed):
        table[row, :count] = torch.tensor([blocks.pop() for _ in range(count)], dtype=torch.int32)
    for rows, count in shared or []:
        table[rows, :count] = table[rows[0], :count].clone()
    shape = (1 + sum(needed), kv_heads, size, dim)
    keys, values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    _poison(keys, values)
    for row, length in enumerate(lengths):
        for low in range(0, length, size):
            count = min(size, length - low)
            for cache in (keys, values):
                tokens = torch.randn(kv_heads, count, dim, generator=source).to(dtype)
                cache.view(_bits(cache))[table[row, low // size], :, :count] = tokens.view(_bits(tokens))
    scales = [torch.rand(kv_heads, generator=source) + 0.5 if dtype == FP8 else None for _ in range(2)]
    k_scale, v_scale = (None if scale is None else scale.to(device) for scale in scales)
    return Paged(keys.to(device), values.to(device), table.to(device), k_scale, v_scale)


def _bits(x: Tensor) -> torch.dtype:
    """float8 tensors can't be indexed everywhere, their bits can."""
    return torch.uint8 if x.dtype == FP8 else x.dtype


def _poison(*caches: Tensor) -> None:
    for cache in caches:
        if cache.dtype == FP8:
            cache.view(torch.uint8).fill_(0x7F)
        else:
            poison(cache)
