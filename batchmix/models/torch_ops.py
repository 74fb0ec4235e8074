"""Mixtral's operators in plain torch: the CPU backend, and what other backends are compared with.

A token has the same bits whatever the others are: products are `torch_products`', and no reduction runs over tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchmix.dtypes import Quantization
from batchmix.models.expert_load import LayerLoad
from batchmix.models.quantized import Experts, dense, format_of, through_fp8
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


def moe(
    x: Tensor, router: Tensor, w13: Experts, w2: Experts, top_k: int, residual: Tensor | None = None,
    load: LayerLoad | None = None,
) -> Tensor:  # fmt: skip
    """Top-k of E SwiGLU experts, weighted by the renormalised router probabilities, see `Operators`; w13 is gate, then
    up. Each expert runs once over its tokens, widened where it is quantised; each token sums its k outputs in router
    order."""
    num_experts = len(router)
    probabilities = product(x.float(), router).softmax(-1)  # [T, E]
    if load is not None and load.num_valid is not None:
        probabilities = probabilities[: int(load.num_valid)]
    weights, experts = probabilities.topk(top_k, dim=-1)  # [T, K], T from here on without padding
    weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)

    pair_expert, order = experts.flatten().sort(stable=True)  # [T*K]; order: pair -> its place before sorting
    counts = torch.bincount(pair_expert, minlength=num_experts)
    if load is not None and load.counts is not None:
        load.counts.add_(counts)
    padded = (counts + ROW_TILE - 1) // ROW_TILE * ROW_TILE
    starts = padded.cumsum(0) - padded  # [E] first row of each expert's segment
    shift = starts - (counts.cumsum(0) - counts)
    place = torch.arange(len(order), device=x.device) + shift[pair_expert]  # [T*K] row of each sorted pair
    ends = padded.cumsum(0).tolist()
    token = order.new_zeros(ends[-1])  # padding rows compute token 0 and are never read
    token[place] = order // top_k
    out = x.new_empty(len(token), x.shape[1])  # [P, D]
    fp8 = format_of(w13) is Quantization.fp8
    inputs = through_fp8(x) if fp8 else x
    for expert, (start, end) in enumerate(zip(starts.tolist(), ends, strict=True)):
        if start == end:
            continue
        up, down = dense(w13[expert], x.dtype), dense(w2[expert], x.dtype)
        for low in range(start, end, EXPERT_CHUNK):
            high = min(low + EXPERT_CHUNK, end)
            h = swiglu(product(inputs.index_select(0, token[low:high]), up))  # [P_e, F]
            out[low:high] = product(through_fp8(h) if fp8 else h, down)
    row_of_pair = torch.empty_like(place)
    row_of_pair[order] = place
    chosen = out.index_select(0, row_of_pair).view(len(weights), top_k, -1)  # [T, K, D]
    result = chosen[:, 0] * weights[:, 0, None]
    for k in range(1, top_k):
        result = torch.addcmul(result, chosen[:, k], weights[:, k, None])
    if len(result) < len(x):
        result = torch.cat((result, result.new_zeros(len(x) - len(result), x.shape[1])))
    return result if residual is None else residual + result
