"""The kernels' oracles: each operator in the plainest torch that is right, one token or row at a time.

Legend: T tokens, D hidden, F expert hidden, E experts, H heads, G kv heads, C head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D] -> [T, D]; Zhang and Sennrich 2019, the mean of squares in float32."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of half-split pairs (i, i + C/2). x [T, H, C], cos and sin [T, C/2] -> [T, H, C]."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        a, b = x[..., i], x[..., half + i]
        c, s = cos[:, i, None], sin[:, i, None]
        out[..., i], out[..., half + i] = a * c - b * s, b * c + a * s
    return out


def moe(x: Tensor, router: Tensor, w13: Tensor, w2: Tensor, top_k: int) -> Tensor:
    """x [T, D], router float32 [E, D], w13 [E, 2F, D] (gate, then up), w2 [E, D, F] -> [T, D]."""
    out = torch.zeros_like(x)
    for t, row in enumerate(x):
        probabilities = (router @ row.float()).softmax(-1)  # [E]
        weights, experts = probabilities.topk(top_k)
        for weight, expert in zip(weights / weights.sum(), experts.tolist(), strict=True):
            gate, up = (w13[expert] @ row).chunk(2)  # [F] each
            out[t] += weight.to(x.dtype) * (w2[expert] @ (F.silu(gate) * up))
    return out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last Tq positions of one row. q [Tq, H, C], k and v [T, G, C] -> [Tq, H, C]."""
    heads, kv_heads = q.shape[1], k.shape[1]
    first = len(k) - len(q)
    out = torch.empty_like(q)
    for t in range(len(q)):
        for head in range(heads):
            group = head // (heads // kv_heads)
            keys, values = k[: first + t + 1, group], v[: first + t + 1, group]  # [t, C]
            weights = (keys @ q[t, head] * q.shape[-1] ** -0.5).float().softmax(0)
            out[t, head] = weights.to(v.dtype) @ values
    return out
