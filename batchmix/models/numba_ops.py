"""The numba backend: the torch backend with compiled kernels between the matrix products, on the CPU.

Products, prefill attention and sampling are the torch backend's, which stays the oracle. A row has the same bits whatever
other rows are in the batch and however many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from batchmix.models import torch_backend
from batchmix.models.backend import AttentionModel
from batchmix.models.expert_load import LayerLoad
from batchmix.models.kv_cache import KVCache
from batchmix.models.numba_cache import Kernels, load_kernels
from batchmix.models.quantized import Experts, as_input
from batchmix.models.step_tokens import Attend, DecodeTokens, StepTokens
from batchmix.models.torch_attention import PrefillAttention, visible_blocks
from batchmix.models.torch_ops import route, run_expert
from batchmix.models.torch_products import ROW_TILE

SPLIT = 512  # tokens of a row's context that are attended to together, a multiple of the cache's block size


class NumbaOperators:
    """See `Operators`, for weights and activations of one dtype."""

    row_tile, cuts_prompts = torch_backend.row_tile, torch_backend.cuts_prompts
    linear, find_shared = staticmethod(torch_backend.linear), staticmethod(torch_backend.find_shared)
    sample, post_update = staticmethod(torch_backend.sample), staticmethod(torch_backend.post_update)

    def __init__(self, dtype: torch.dtype) -> None:
        self._kernels = load_kernels(dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        self._kernels("rms_norm", *x.shape, float(eps), x, weight, out, work=x.numel())
        return out

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(x)
        self._kernels("add_rms_norm", *x.shape, float(eps), residual, x, weight, out, work=x.numel())
        return residual, out

    def moe(
        self, x: Tensor, router: Tensor, w13: Experts, w2: Experts, top_k: int, residual: Tensor, load: LayerLoad | None
    ) -> Tensor:
        """As torch_ops.moe: each expert runs once over its tokens."""
        weights, experts = route(x, router, top_k, load)  # [T, K], without padding
        (tokens, width), (valid, _) = x.shape, experts.shape
        num_experts, pairs = len(router), valid * top_k
        counts, ends = np.empty((2, num_experts), np.int64)
        token_of_row = np.empty(pairs + num_experts * (ROW_TILE - 1), np.int64)
        row_of_pair = np.empty(pairs, np.int64)
        self._kernels(
            "sort_by_expert", pairs, top_k, num_experts, ROW_TILE, experts, counts, ends, token_of_row, row_of_pair
        )
        if load is not None:
            load.counts.add_(torch.from_numpy(counts))
        inputs, token = as_input(x, w13), torch.from_numpy(token_of_row)
        out = x.new_empty(int(ends[-1]), width)  # [P, D], the rows of an expert together
        for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
            if start < end:
                run_expert(inputs, token[start:end], w13[expert], w2[expert], out[start:end], self.swiglu)
        result = torch.empty_like(residual)
        self._kernels(
            "combine", tokens, width, top_k, valid, out, weights, row_of_pair, residual, result, work=result.numel()
        )
        return result

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up. [P, 2F] -> [P, F]"""
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self._kernels("swiglu", rows, width, gate_up, out, work=out.numel())
        return out

    def attend(self, model: AttentionModel, cache: KVCache, step: StepTokens) -> Attend:
        """See `Operators`. A cache of another dtype, fp8, is left to the torch backend."""
        if cache.keys.dtype != model.weights.embedding.dtype:
            return torch_backend.attend(model, cache, step)
        config, kernels = model.config, self._kernels
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        places = cache.places(step)
        rows = decode_attention(kernels, cache, step.decode, heads) if step.decode is not None else None
        prompts = PrefillAttention(cache, step.chunks) if step.chunks else None

        def attend(layer: int, qkv: Tensor) -> Tensor:
            kernels(
                "rotate_and_cache", len(qkv), heads, kv_heads, dim, cache.block_size, qkv, *cache.layer(layer),
                model.cos, model.sin, *places, work=qkv.numel(),
            )  # fmt: skip
            q, k, v = torch.split(qkv.view(len(qkv), -1, dim), [heads, kv_heads, kv_heads], dim=1)
            out = qkv.new_zeros(len(qkv), heads, dim)
            if rows is not None:
                rows(layer, qkv, out)
            if prompts is not None:
                prompts(layer, q, k, v, out)
            return out.flatten(1)

        return attend


def decode_attention(
    kernels: Kernels, cache: KVCache, decode: DecodeTokens, heads: int
) -> Callable[[int, Tensor, Tensor], None]:
    """Attention of one new token per row over its paged context, the heads of a kv head together.

    A context is attended to in splits of SPLIT tokens, on any thread each, whose results are merged in their order.
    Takes a layer and qkv [T, (H + 2G) C] of the step -> the rows' tokens, which are the first, of out [T, H, C].
    """
    table, context = visible_blocks(decode)
    counts, rows = -(-context // SPLIT), len(context)
    first = np.concatenate((np.zeros(1, np.int64), counts.cumsum()))  # [B + 1] a row's first split
    row = np.repeat(np.arange(rows), counts)  # [splits]
    start = (np.arange(len(row)) - first[row]) * SPLIT
    end = np.minimum(start + SPLIT, context[row])
    _, _, kv_heads, size, dim = cache.keys.shape
    sums, scales = torch.empty(len(row), heads, dim), torch.empty(len(row), heads, 2)
    scratch = torch.empty(torch.get_num_threads(), heads // kv_heads, dim + size)
    work = 2 * int((end - start).sum()) * heads * dim

    def attend(layer: int, qkv: Tensor, out: Tensor) -> None:
        kernels(
            "attend_splits", len(row), heads, kv_heads, dim, size, qkv, *cache.layer(layer), table, table.shape[1], row,
            start, end, sums, scales, scratch, dim**-0.5, work=work,
        )  # fmt: skip
        kernels("merge_splits", rows, heads, dim, first, sums, scales, out, work=rows * heads * dim)

    return attend
