"""The torch backend: the operators of torch_ops, torch_attention and torch_sampler, on the CPU.

It is the oracle of other backends. A row has the same bits whatever other rows are in the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batchmix.models.backend import AttentionModel
from batchmix.models.kv_cache import KVCache
from batchmix.models.step_tokens import Attend, StepTokens
from batchmix.models.torch_attention import DecodeAttention, PrefillAttention, visible_blocks
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
    positions, blocks, offsets = cache.places(step)
    rows = DecodeAttention(cache, *visible_blocks(step.decode)) if step.decode is not None else None
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
