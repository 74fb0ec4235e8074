"""The torch backend: the operators of torch_ops, torch_attention and torch_sampler, on the CPU.

It is the oracle of other backends. A row has the same bits whatever other rows are in the batch: the work of those modules.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from batchmix.models.backend import Attend, DecodeTokens, PrefillChunk
from batchmix.models.kv_cache import SCRATCH_BLOCK, KVCache
from batchmix.models.mixtral import Mixtral
from batchmix.models.torch_attention import DecodeAttention, PrefillAttention
from batchmix.models.torch_ops import add_rms_norm, moe, rms_norm, rotate
from batchmix.models.torch_products import ROW_TILE
from batchmix.models.torch_products import product as linear
from batchmix.models.torch_sampler import post_update, sample

__all__ = [
    "add_rms_norm",
    "attend",
    "cuts_prompts",
    "find_shared",
    "linear",
    "moe",
    "post_update",
    "rms_norm",
    "row_tile",
    "sample",
]
row_tile = ROW_TILE
cuts_prompts = False  # a later chunk is rounded otherwise than a first one


def find_shared(
    model: Mixtral, cache: KVCache, block_table: np.ndarray, prompt_tokens: np.ndarray, version: int, keep: bool
) -> None:
    """See `Operators`. Every row attends to its blocks on its own here."""


def attend(
    model: Mixtral,
    cache: KVCache,
    decode: DecodeTokens | None,
    chunks: Sequence[PrefillChunk],
    num_tokens: int,
    shared: object = None,
) -> Attend:
    """See `Operators`."""
    config, size = model.config, cache.block_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    position = np.zeros(num_tokens, np.int64)
    block = np.full(num_tokens, SCRATCH_BLOCK, np.int64)
    rows = None
    if decode is not None:
        count = len(decode.host_positions)
        running = decode.running[:count].numpy()
        table = decode.block_table[:count].numpy().astype(np.int64)
        table[~running] = SCRATCH_BLOCK  # rows that have ended write there
        position[:count] = decode.positions[:count].numpy() * running
        block[:count] = table[np.arange(count), position[:count] // size]
        rows = DecodeAttention(cache, table, position[:count] + 1)
    for chunk in chunks:
        here, at = slice(chunk.offset, chunk.offset + chunk.length), np.arange(chunk.start, chunk.start + chunk.length)
        position[here], block[here] = at, np.asarray(chunk.blocks)[at // size]
    prompts = PrefillAttention(cache, chunks) if chunks else None
    positions, blocks, offsets = map(torch.from_numpy, (position, block, position % size))
    cos, sin = model.cos[positions], model.sin[positions]  # [T, C/2]

    def attend(layer: int, qkv: Tensor) -> Tensor:
        qkv = qkv.view(len(qkv), heads + 2 * kv_heads, config.head_dim)
        q, k = torch.split(rotate(qkv[:, : heads + kv_heads], cos, sin), [heads, kv_heads], dim=1)
        v = qkv[:, heads + kv_heads :]
        cache.write(layer, blocks, offsets, k, v)
        out = q.new_zeros(q.shape)
        if rows is not None:
            rows(layer, q, out)
        if prompts is not None:
            prompts(layer, q, k, v, out)
        return out.flatten(1)

    return attend
