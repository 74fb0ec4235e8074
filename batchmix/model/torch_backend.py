"""The torch backend: the operators of torch_ops, torch_attention and torch_sampler, on the CPU.

It is the oracle of other backends; that its bits do not depend on a row's company is the work of those modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from batchmix.engine.forced import Lanes
from batchmix.engine.kv_cache import SCRATCH_BLOCK, KVCache
from batchmix.engine.slots import InputBatch
from batchmix.kernels.row_state import Finish
from batchmix.model.backend import Attend, Chunk
from batchmix.model.mixtral import Mixtral
from batchmix.model.torch_attention import DecodeAttention, PrefillAttention
from batchmix.model.torch_ops import add_rms_norm, moe, rms_norm, rotate
from batchmix.model.torch_products import ROW_TILE
from batchmix.model.torch_products import product as linear
from batchmix.model.torch_sampler import post_update, sample

__all__ = [
    "add_rms_norm",
    "decode",
    "find_shared",
    "linear",
    "moe",
    "post_update",
    "prefill",
    "rms_norm",
    "row_tile",
    "sample",
]
row_tile = ROW_TILE


def prefill(model: Mixtral, cache: KVCache, chunks: Sequence[Chunk], num_tokens: int) -> Attend:
    """See `Operators`."""
    positions = np.zeros(num_tokens, np.int64)
    for chunk in chunks:
        positions[chunk.offset : chunk.offset + chunk.length] = np.arange(chunk.start, chunk.start + chunk.length)
    return _rotating(model, torch.from_numpy(positions), PrefillAttention(cache, chunks, num_tokens))


def find_shared(model: Mixtral, cache: KVCache, slots: InputBatch, num_tokens: int) -> None:
    """See `Operators`. Every row attends to its blocks on its own here."""


def decode(model: Mixtral, cache: KVCache, slots: InputBatch | Lanes, rows: int, num_tokens: int, width: int) -> Attend:
    """See `Operators`."""
    running = slots.finish[:rows].numpy() == Finish.RUNNING
    context = slots.context[:rows].numpy() * running + 1
    table = slots.block_table[:rows, :width].astype(np.int64)
    table[~running] = SCRATCH_BLOCK  # rows that have ended write there
    return _rotating(model, slots.context[:num_tokens], DecodeAttention(cache, table, context))


def _rotating(model: Mixtral, positions: Tensor, attention: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """`attention` over q, k and v after rotary embedding at int64 positions [T]."""
    cos, sin = model.cos[positions], model.sin[positions]  # [T, C/2]
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

    def attend(layer: int, qkv: Tensor) -> Tensor:
        qkv = qkv.view(len(qkv), heads + 2 * kv_heads, config.head_dim)
        q, k = torch.split(rotate(qkv[:, : heads + kv_heads], cos, sin), [heads, kv_heads], dim=1)
        return attention(layer, q, k, qkv[:, heads + kv_heads :]).flatten(1)

    return attend
