"""Attention over the paged cache by the Triton kernels: a step's layout made once, run in every layer.

Legend: T packed tokens, L of them generated, H heads, G kv heads, C head dim, S block size, W blocks per table row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from batchmix.kernels.attention_decode import DecodePlan, SharedSplits, attend_decode, plan_decode
from batchmix.kernels.attention_prefill import PrefillPlan, attend_prefill, plan_prefill
from batchmix.kernels.rotary import rotate_and_cache
from batchmix.models.async_copy import async_copy_to_gpu
from batchmix.models.backend import DecodeTokens, PrefillChunk
from batchmix.models.kv_cache import SCRATCH_BLOCK, KVCache
from batchmix.models.mixtral import Mixtral


class StepAttention:
    """One step's attention: generated tokens by the decode kernels, prompt chunks by the prefill kernel.

    The two differ in bits, so a generated token never goes through the second, nor a prompt's through the first. A step
    of generated tokens alone is laid out on the device, so a CUDA graph of it follows the rows.
    """

    def __init__(
        self,
        model: Mixtral,
        cache: KVCache,
        decode: DecodeTokens | None,
        chunks: Sequence[PrefillChunk],
        num_tokens: int,
        shared: SharedSplits | None,
    ) -> None:
        self.model, self.cache = model, cache
        self.ratio = model.config.num_attention_heads // model.config.num_key_value_heads
        self.num_decode = 0 if decode is None else len(decode.positions)
        self.decode: DecodePlan | None = None
        self.prefill: PrefillPlan | None = None
        places: list[tuple[Tensor, ...]] = []  # each token's position, block and offset in the block, int64 [3, ...]
        if decode is not None:
            position = decode.positions * decode.running
            block = decode.block_table.gather(1, (position // cache.block_size)[:, None])[:, 0].long()
            block = torch.where(decode.running, block, SCRATCH_BLOCK)
            places.append((position, block, position % cache.block_size))
            context = position + decode.running
            self.decode = plan_decode(decode.block_table, context, cache.block_size, self.ratio, shared)
        if num_tokens > self.num_decode:
            places.append(self._lay_out(chunks, num_tokens - self.num_decode).unbind())
        joined = places[0] if len(places) == 1 else tuple(map(torch.cat, zip(*places, strict=True)))
        self.positions, self.blocks, self.offsets = joined

    def _lay_out(self, chunks: Sequence[PrefillChunk], num_tokens: int) -> Tensor:
        """Plan the chunks; padding behind them writes to the scratch block and gives zeros. -> int64 [3, num_tokens]."""
        device, size = self.cache.keys.device, self.cache.block_size
        places = np.zeros((3, num_tokens), np.int64)
        places[1] = SCRATCH_BLOCK
        # Rows of a table end at different places; a chunk is read only up to its own end.
        table = np.full((len(chunks), max((len(chunk.blocks) for chunk in chunks), default=1)), SCRATCH_BLOCK, np.int32)
        spans = []
        for row, chunk in enumerate(chunks):
            offset = chunk.offset - self.num_decode
            position = np.arange(chunk.start, chunk.start + chunk.length)
            table[row, : len(chunk.blocks)] = chunk.blocks
            places[:, offset : offset + chunk.length] = position, table[row, position // size], position % size
            spans.append((offset, chunk.start, chunk.length))
        dtype = self.model.weights.embedding.dtype
        self.prefill = plan_prefill(spans, async_copy_to_gpu(table, device), num_tokens, self.ratio, dtype)
        return async_copy_to_gpu(places, device)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """See `Attend`."""
        keys, values = self.cache.layer(layer)
        k_scale, v_scale = self.cache.scales
        cos, sin = self.model.cos, self.model.sin
        q = rotate_and_cache(
            qkv, cos, sin, self.positions, self.blocks, self.offsets, keys, values, k_scale, v_scale
        )  # [T, H, C]
        out = torch.empty_like(q)
        if self.decode is not None:
            here = slice(0, self.num_decode)
            attend_decode(q[here], keys, values, *self.decode, k_scale, v_scale, out[here])
        if self.prefill is not None:
            here = slice(self.num_decode, len(q))
            attend_prefill(q[here], keys, values, *self.prefill, k_scale, v_scale, out[here])
        return out.flatten(1)
