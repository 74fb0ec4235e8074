"""The numba backend: the torch backend with compiled kernels between the matrix products, on the CPU.

Products, prefill attention and sampling are the torch backend's, which stays the oracle. A row has the same bits whatever
other rows are in the batch and however many threads there are.
"""

from __future__ import annotations

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
from batchmix.models.step_tokens import Attend, StepTokens
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
        rows = int(ends[-1])
        inputs, out = x.new_empty(2, rows, width)  # [P, D] each, the rows of an expert together
        self._kernels("gather", rows, width, as_input(x, w13), token_of_row, inputs, work=inputs.numel())
        for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
            if start < end:
                run_expert(inputs[start:end], w13[expert], w2[expert], out[start:end], self.swiglu)
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
        rows = DecodeAttention(kernels, cache, *visible_blocks(step.decode), heads) if step.decode is not None else None
        prompts = PrefillAttention(cache, step.chunks) if step.chunks else None

        def attend(layer: int, qkv: Tensor) -> Tensor:
            keys, values = cache.layer(layer)
            kernels(
                "rotate_and_cache", len(qkv), heads, kv_heads, dim, cache.block_size, qkv, keys, values,
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


class DecodeAttention:
    """Attention of one new token per row over its paged context, the heads of a kv head together.

    A context is attended to in splits of SPLIT tokens, on any thread each, whose results are merged in their order.
    """

    def __init__(
        self, kernels: Kernels, cache: KVCache, table: np.ndarray, context: np.ndarray, num_heads: int
    ) -> None:
        """See `visible_blocks`."""
        self._kernels, self._cache, self._table, self._num_heads = kernels, cache, table, num_heads
        counts = -(-context // SPLIT)
        self._first = np.concatenate((np.zeros(1, np.int64), counts.cumsum()))  # [B + 1] a row's first split
        self._row = np.repeat(np.arange(len(context)), counts)  # [splits]
        self._start = (np.arange(len(self._row)) - self._first[self._row]) * SPLIT
        self._end = np.minimum(self._start + SPLIT, context[self._row])
        _, _, kv_heads, size, dim = cache.keys.shape
        self._sums = torch.empty(len(self._row), num_heads, dim)
        self._scales = torch.empty(len(self._row), num_heads, 2)
        self._scratch = torch.empty(torch.get_num_threads(), num_heads // kv_heads, dim + size)

    def __call__(self, layer: int, qkv: Tensor, out: Tensor) -> None:
        """qkv [T, (H + 2G) C] of the step -> the rows' tokens, which are the first, of out [T, H, C]."""
        keys, values = self._cache.layer(layer)
        _, kv_heads, size, dim = keys.shape
        heads, work = self._num_heads, 2 * int((self._end - self._start).sum()) * self._num_heads
        self._kernels(
            "attend_splits", len(self._row), heads, kv_heads, dim, size, qkv, keys, values, self._table,
            self._table.shape[1], self._row, self._start, self._end, self._sums, self._scales, self._scratch, dim**-0.5,
            work=work * dim,
        )  # fmt: skip
        rows = len(self._first) - 1
        self._kernels(
            "merge_splits", rows, heads, dim, self._first, self._sums, self._scales, out, work=rows * heads * dim
        )
