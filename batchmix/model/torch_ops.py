"""Mixtral's operators in plain torch: the CPU backend, and what other backends are compared with.

Every operator gives a token the same bits whatever the other tokens are. What that takes on a CPU: matrix
products see their rows in multiples of `ROW_TILE` (a smaller or ragged number sends the library down kernels that
sum in another order: with MKL on AVX2, rows 1-11 differ unless a multiple of 4), MKL must not cut a sum over several
threads when it has more of them than rows to share, and no reduction runs over tokens. Libraries differ and change, so
an engine asks `products_keep_their_bits` about its own weights when it starts.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

# MKL's strict reproducibility, which it reads at its first product, keeps it from cutting sums over threads on AVX2.
# With AVX-512 it does the opposite: there the default kept every bit of 45 shapes on 2 to 64 threads, strict of 15.
if not torch.cpu.get_capabilities().get("avx512_f"):
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

ROW_TILE = 16  # callers pad T to a multiple of it; the expert segments below are padded to it too
_EXPERT_CHUNK = 2048  # rows per expert product: 12 % faster than 512, and activations stay a few MB


def pad_rows(rows: int) -> int:
    """`rows` rounded up to a multiple of ROW_TILE."""
    return -(-rows // ROW_TILE) * ROW_TILE


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D] -> [T, D]; the mean in float32, as transformers' MixtralRMSNorm."""
    return weight * F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] with T a multiple of ROW_TILE, weight [out, in] -> [T, out]."""
    assert len(x) % ROW_TILE == 0, len(x)
    return F.linear(x, weight)


def products_keep_their_bits(weight: Tensor, max_rows: int) -> bool:
    """Whether a row's product with weight [out, in] has the same bits alone in its tile and among up to `max_rows`."""
    source = torch.Generator().manual_seed(0)
    tile = torch.randn(ROW_TILE, weight.shape[1], generator=source).to(weight)
    alone = linear(tile, weight)
    counts = {pad_rows(min(rows, max_rows)) for rows in (2 * ROW_TILE, 5 * ROW_TILE, 32 * ROW_TILE)}
    return all(
        torch.equal(linear(tile.repeat(rows // ROW_TILE, 1), weight), alone.repeat(rows // ROW_TILE, 1))
        for rows in counts
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on half-split pairs. x [T, heads, C], cos and sin float32 [T, C/2] -> [T, heads, C]."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, in float32 up to the product with `up`. [P, 2F] -> [P, F].

    Not F.silu: its scalar code, which runs where a thread's share ends, rounds otherwise than its vector code, so an
    element's bits would depend on how many threads share how many rows.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    scale = gate.float().neg().exp_().add_(1)
    return torch.div(gate, scale, out=scale).to(up.dtype).mul_(up)


def moe(x: Tensor, router: Tensor, w13: Tensor, w2: Tensor, top_k: int) -> Tensor:
    """Top-k of E SwiGLU experts, their outputs weighted by the renormalised router probabilities.

    x [T, D], router float32 [E, D], w13 [E, 2F, D] (gate, then up), w2 [E, D, F] -> [T, D]. (token, expert) pairs are
    sorted by expert, each expert runs once over its tokens, and each token sums its k outputs in router order.
    """
    num_experts = len(router)
    probabilities = linear(x.float(), router).softmax(-1)  # [T, E]
    weights, experts = probabilities.topk(top_k, dim=-1)  # [T, K]
    weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)

    pair_expert, order = experts.flatten().sort(stable=True)  # [T*K]; order: pair -> its place before sorting
    counts = torch.bincount(pair_expert, minlength=num_experts)
    padded = (counts + ROW_TILE - 1) // ROW_TILE * ROW_TILE
    starts = padded.cumsum(0) - padded  # [E] first row of each expert's segment
    shift = starts - (counts.cumsum(0) - counts)
    place = torch.arange(len(order), device=x.device) + shift[pair_expert]  # [T*K] row of each sorted pair
    ends = padded.cumsum(0).tolist()
    token = order.new_zeros(ends[-1])  # padding rows compute token 0 and are never read
    token[place] = order // top_k
    out = x.new_empty(len(token), x.shape[1])  # [P, D]
    for expert, (start, end) in enumerate(zip(starts.tolist(), ends, strict=True)):
        for low in range(start, end, _EXPERT_CHUNK):
            high = min(low + _EXPERT_CHUNK, end)
            rows = x.index_select(0, token[low:high])  # [P_e, D]
            torch.matmul(swiglu(F.linear(rows, w13[expert])), w2[expert].T, out=out[low:high])
    row_of_pair = torch.empty_like(place)
    row_of_pair[order] = place
    chosen = out.index_select(0, row_of_pair).view(len(x), top_k, -1)  # [T, K, D]
    result = chosen[:, 0] * weights[:, 0, None]
    for k in range(1, top_k):
        result = torch.addcmul(result, chosen[:, k], weights[:, k, None])
    return result
