"""Mixtral's operators in plain torch: the CPU backend, and what other backends are compared with.

A token has the same bits whatever the others are: products are `torch_products`', and no reduction runs over tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from batchmix.models.expert_load import LayerLoad
from batchmix.models.quantized import Experts, Weight, as_input, dense
from batchmix.models.torch_products import ROW_TILE, product

EXPERT_CHUNK = 512  # rows per expert product: more do not make it faster, and the activations stay in the cache


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D] -> [T, D]; the mean in float32, as transformers' MixtralRMSNorm."""
    return weight * F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + x and its norm, [T, D] each."""
    total = residual + x
    return total, rms_norm(total, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on half-split pairs. x [T, heads, C], cos and sin float32 [T, C/2] -> [T, heads, C]."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, in float32 up to the product with `up`. [P, 2F] -> [P, F]. Not F.silu: where a thread's share
    ends it rounds otherwise, so an element's bits would depend on how many threads share how many rows."""
    gate, up = gate_up.chunk(2, dim=-1)
    scale = gate.float().neg().exp_().add_(1)
    return torch.div(gate, scale, out=scale).to(up.dtype).mul_(up)


def route(x: Tensor, router: Tensor, top_k: int, load: LayerLoad | None) -> tuple[Tensor, Tensor]:
    """Renormalised probabilities of x's dtype, and int64 experts, [T, K] each, of the tokens that are no padding."""
    probabilities = product(x.float(), router).softmax(-1)  # [T, E]
    if load is not None:
        probabilities = probabilities[: int(load.num_valid)]
    weights, experts = probabilities.topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), experts


def run_expert(
    x: Tensor, tokens: Tensor, up: Weight, down: Weight, out: Tensor, activation: Callable[[Tensor], Tensor] = swiglu
) -> None:
    """One expert over `tokens` int64 [P] of x [T, D], P a multiple of ROW_TILE, into out [P, D]."""
    up_dense, down_dense = dense(up, x.dtype), dense(down, x.dtype)
    for low in range(0, len(tokens), EXPERT_CHUNK):
        inputs = x.index_select(0, tokens[low : low + EXPERT_CHUNK])
        h = activation(product(inputs, up_dense))  # [P_e, F]
        out[low : low + EXPERT_CHUNK] = product(as_input(h, down), down_dense)


def moe(
    x: Tensor, router: Tensor, w13: Experts, w2: Experts, top_k: int, residual: Tensor | None = None,
    load: LayerLoad | None = None,
) -> Tensor:  # fmt: skip
    """Top-k of E SwiGLU experts, weighted by the renormalised router probabilities, see `Operators`; w13 is gate, then
    up. Each expert runs once over its tokens; each token sums its k outputs in router order."""
    weights, experts = route(x, router, top_k, load)  # [T, K], T from here on without padding
    counts, order = torch.bincount(experts.flatten(), minlength=len(router)), experts.flatten().argsort(stable=True)
    if load is not None:
        load.counts.add_(counts)
    inputs, chosen = as_input(x, w13), x.new_empty(len(order), x.shape[1])  # [T, D]; [T*K, D], a row for each pair
    for expert, pairs in enumerate(torch.split(order, counts.tolist())):
        if len(pairs):
            tokens = F.pad(pairs // top_k, (0, -len(pairs) % ROW_TILE))  # padding rows compute token 0
            out = x.new_empty(len(tokens), x.shape[1])
            run_expert(inputs, tokens, w13[expert], w2[expert], out)
            chosen.index_copy_(0, pairs, out[: len(pairs)])
    chosen = chosen.view(len(weights), top_k, -1)
    result = chosen[:, 0] * weights[:, 0, None]
    for k in range(1, top_k):
        result = torch.addcmul(result, chosen[:, k], weights[:, k, None])
    if len(result) < len(x):
        result = torch.cat((result, result.new_zeros(len(x) - len(result), x.shape[1])))
    return result if residual is None else residual + result
