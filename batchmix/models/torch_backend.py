"""The torch backend: the operators of torch_ops, torch_attention and torch_sampler, on the CPU.

It is the oracle of other backends. A row has the same bits whatever other rows are in the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batchmix.models.backend import AttentionModel
from batchmix.models.kv_cache import SCRATCH_BLOCK, KVCache
from batchmix.models.step_tokens import Attend, StepTokens
from batchmix.models.torch_attention import DecodeAttention, PrefillAttention
from batchmix.models.torch_ops import add_rms_norm, moe, rms_norm, rotate
from batchmix.models.torch_products import ROW_TILE as row_tile
from batchmix.models.torch_products import product as linear
from batchmix.models.torch_sampler import post_update, sample

__all__ = ["add_rms_norm", "attend", "cuts_prompts", "find_shared", "linear", "moe", "post_update", "rms_norm",
           "row_tile", "sample"]  # fmt: skip
cuts_prompts = False  # a later chunk is rounded otherwise than a first one


def find_shared(
    model: AttentionModel, cache: KVCache, block_table: np.ndarray, prompt_tokens: np.ndarray, version: int
) -> None:
    """See `Operators`. Every row attends to its blocks on its own here."""


def attend(model: AttentionModel, cache: KVCache, step: StepTokens) -> Attend:
    """See `Operators`."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    places, table, context = place_tokens(cache, step)
    positions, blocks, offsets = map(torch.from_numpy, places)
    rows = DecodeAttention(cache, table, context) if len(context) else None
    prompts = PrefillAttention(cache, step.chunks) if step.chunks else None
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


def place_tokens(cache: KVCache, step: StepTokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position, block and offset in the block of each token, int64 [3, T]; of the rows that decode, their blocks
    int64 [B, W] and how many tokens each sees, int64 [B]. Padding, and rows that have ended, write to the scratch block.
    """
    size, places = cache.block_size, np.full((3, step.size), SCRATCH_BLOCK)
    table, context = np.zeros((0, 1), np.int64), np.zeros(0, np.int64)
    if (decode := step.decode) is not None:
        count = len(decode.host_positions)
        running = decode.running[:count].numpy()
        table = decode.host_blocks.astype(np.int64)
        table[~running] = SCRATCH_BLOCK
        position = decode.positions[:count].numpy() * running
        places[:, :count] = position, table[np.arange(count), position // size], position % size
        context = position + 1
    if step.chunks:
        of_prompts, first = step.prompt_places(size), step.chunks[0].offset
        places[:, first : first + of_prompts.shape[1]] = of_prompts
    return places, table, context
