"""Attention over the paged cache by the Triton kernels: a step's layout made once, run in every layer.

Legend: T packed tokens, B slots of a step, H heads, G kv heads, C head dim, S block size, W blocks per table row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from batchmix.engine.async_copy import async_copy_to_gpu
from batchmix.engine.forced import Lanes
from batchmix.engine.kv_cache import SCRATCH_BLOCK, KVCache
from batchmix.engine.slots import InputBatch
from batchmix.kernels.attention_decode import SharedSplits, decode_attention, plan_decode
from batchmix.kernels.attention_prefill import plan_prefill, prefill_attention
from batchmix.kernels.rotary import rotate_and_cache
from batchmix.kernels.row_state import Finish
from batchmix.model.backend import Chunk
from batchmix.model.mixtral import Mixtral


class _Paged:
    """Tokens' places in their rows and in the cache, int64 [T] each."""

    def __init__(self, model: Mixtral, cache: KVCache, positions: Tensor, blocks: Tensor, offsets: Tensor) -> None:
        self.model, self.cache = model, cache
        self.places = positions, blocks, offsets
        self.ratio = model.config.num_attention_heads // model.config.num_key_value_heads

    def _rotate(self, layer: int, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [T, (H + 2G) C] -> rotated queries [T, H, C], and the layer's keys and values, qkv's among them."""
        keys, values = self.cache.layer(layer)
        cos, sin, scales = self.model.cos, self.model.sin, self.cache.scales
        return rotate_and_cache(qkv, cos, sin, *self.places, keys, values, *scales), keys, values


class PrefillAttention(_Paged):
    """Causal attention of packed prompt chunks; padding writes to the scratch block and gives zeros."""

    def __init__(self, model: Mixtral, cache: KVCache, chunks: Sequence[Chunk], num_tokens: int) -> None:
        device, size = cache.keys.device, cache.block_size
        places = np.zeros((3, num_tokens), np.int64)
        places[1] = SCRATCH_BLOCK
        # Rows of a table end at different places; a chunk is read only up to its own end.
        table = np.full((len(chunks), max(len(chunk.blocks) for chunk in chunks)), SCRATCH_BLOCK, np.int32)
        for row, chunk in enumerate(chunks):
            position = np.arange(chunk.start, chunk.start + chunk.length)
            table[row, : len(chunk.blocks)] = chunk.blocks
            places[:, chunk.offset : chunk.offset + chunk.length] = (
                position, table[row, position // size], position % size
            )  # fmt: skip
        super().__init__(model, cache, *async_copy_to_gpu(places, device).unbind())
        spans = [(chunk.offset, chunk.start, chunk.length) for chunk in chunks]
        blocks = async_copy_to_gpu(table, device)
        self.plan = plan_prefill(spans, blocks, num_tokens, self.ratio, model.weights.embedding.dtype)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        plan = self.plan
        attended = prefill_attention(
            *self._rotate(layer, qkv), plan.chunks, plan.tiles, plan.block_table, plan.query_tile, *self.cache.scales
        )
        return attended.flatten(1)


class DecodeAttention(_Paged):
    """Attention of the last token of each running slot; slots that are free or have ended give zeros.

    All of it is computed on the device, so a CUDA graph of it follows the rows; `width` gives the same bits if it is
    large enough.
    """

    def __init__(
        self,
        model: Mixtral,
        cache: KVCache,
        slots: InputBatch | Lanes,
        num_slots: int,
        width: int,
        shared: SharedSplits | None,
    ) -> None:
        running = slots.finish[:num_slots] == Finish.RUNNING
        position = slots.context[:num_slots] * running
        table = slots.device_blocks[:num_slots, :width]
        block = table.gather(1, (position // cache.block_size)[:, None])[:, 0].long()
        block = torch.where(running, block, SCRATCH_BLOCK)
        super().__init__(model, cache, position, block, position % cache.block_size)
        self.plan = plan_decode(table, position + running, cache.block_size, self.ratio, shared)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        return decode_attention(*self._rotate(layer, qkv), *self.plan, *self.cache.scales).flatten(1)
