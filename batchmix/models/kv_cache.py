"""The paged KV cache: keys and values of every layer in blocks of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from batchmix.models.async_copy import async_copy_to_gpu
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.models.quantized import FP8, fp8_values
from batchmix.models.step_tokens import Attend, StepTokens

_E4M3_MAX = 448.0
BLOCK_SIZE = 64  # tokens; decode's batched products run fastest on CPU at 32 to 64
SCRATCH_BLOCK = 0  # where padding tokens write; no row ever owns it


class KVCache:
    """Keys and values of every layer, [layers, blocks, G, block_size, C] each: a head's part of a block is dense.

    The scales of a cache of float8_e4m3fn are 1, as vLLM's where a checkpoint brings none; values are cut off at ±448.
    """

    streamed_bytes = 0  # copied to the device so far

    def __init__(
        self, config: MixtralConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, num_blocks, config.num_key_value_heads, block_size, config.head_dim)
        self._hold(_zeros(shape, dtype, device), _zeros(shape, dtype, device))

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        ones = torch.ones(1, device=keys.device)
        # Of keys, of values.
        self.scales: tuple[Tensor | None, Tensor | None] = (ones, ones) if keys.dtype == FP8 else (None, None)
        _, self.num_blocks, _, self.block_size, _ = keys.shape

    @staticmethod
    def block_bytes(config: MixtralConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        return per_token * block_size

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v [T, G, C] at (block, offset), int64 [T] each."""
        keys, values = self.layer(layer)
        words(keys)[blocks, :, offsets] = words(self._narrow(k))
        words(values)[blocks, :, offsets] = words(self._narrow(v))

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values, on the device."""
        return self.keys[layer], self.values[layer]

    def places(self, step: StepTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Position, block and offset in the block of each of a step's tokens, int64 [T] on the device. Padding, and rows
        that have ended, write to the scratch block."""
        places: list[tuple[Tensor, ...]] = []
        num_decode, size = 0, self.block_size
        if (decode := step.decode) is not None:
            num_decode, position = len(decode.positions), decode.positions * decode.running
            block = decode.block_table.gather(1, (position // size)[:, None])[:, 0].long()
            places.append((position, torch.where(decode.running, block, SCRATCH_BLOCK), position % size))
        if num_prompt := step.size - num_decode:
            of_prompts = step.prompt_places(size)
            of_prompts = np.pad(of_prompts, ((0, 0), (0, num_prompt - of_prompts.shape[1])))  # to the scratch block
            places.append(async_copy_to_gpu(of_prompts, self.keys.device).unbind())
        positions, blocks, offsets = places[0] if len(places) == 1 else map(torch.cat, zip(*places, strict=True))
        return positions, blocks, offsets

    def around_step(self, attend: Attend, step: StepTokens) -> Attend:
        """`attend`, and around it whatever the cache does to have each layer on the device."""
        return attend

    def as_stored(self, x: Tensor) -> Tensor:
        """x as it will be read from the cache, in its own dtype."""
        return x if self.keys.dtype == x.dtype else self._narrow(x).to(x.dtype)

    def read(self, cached: Tensor, blocks: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Blocks of one layer's keys or values [blocks, G, S, C], as `dtype`."""
        stored = words(cached)[blocks].view(cached.dtype)
        return fp8_values(stored).to(dtype) if cached.dtype == FP8 else stored

    def _narrow(self, x: Tensor) -> Tensor:
        """x in the cache's dtype, cut off at what fp8 can hold: its cast would give NaN."""
        return (x.clamp(-_E4M3_MAX, _E4M3_MAX) if self.keys.dtype == FP8 else x).to(self.keys.dtype)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks over all layers, in the order of the device's work."""
        for cached in (self.keys, self.values):
            stored, device = words(cached), cached.device
            copied = stored.index_select(1, async_copy_to_gpu(np.array(sources), device))
            stored.index_copy_(1, async_copy_to_gpu(np.array(targets), device), copied)


def words(tensor: Tensor) -> Tensor:
    """Of float8 its bytes: torch indexes few things of float8."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, since scores over stale memory have to be finite. On the CPU memory is only taken where it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
