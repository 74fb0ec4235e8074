# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Which experts a token goes to, and the (token, expert) pairs in the order in which experts work on them.

Legend: T tokens, K experts per token, P = T*K pairs, D hidden, E experts. Pair t*K + k is the k-th choice of token t.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from batchmix.kernels.launch import cdiv, kernel, next_power_of_2, operator

_ROUTE_TOKENS = 4  # fixed, like the width below: the order of a logit's sum must not depend on T
_ROUTE_ELEMENTS = 8192  # tokens * experts * columns that a program holds in registers
_SORT_ELEMENTS = 8192  # pairs * experts


@kernel("num_tokens")
def _route_kernel(
    x,
    router,
    weights,
    experts,
    num_valid,
    num_tokens,
    D: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if num_valid is not None:
        num_tokens = tl.minimum(num_tokens, tl.load(num_valid))
    if tl.program_id(0) * BLOCK_T >= num_tokens:
        return
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    known = tokens < num_tokens
    choices = tl.arange(0, E_PAD)
    rows = x + tokens.to(tl.int64)[:, None, None] * D
    acc = tl.zeros((BLOCK_T, E_PAD, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        columns = (d + tl.arange(0, BLOCK_D))[None, None, :]
        xs = tl.load(rows + columns, mask=known[:, None, None] & (columns < D), other=0.0).to(tl.float32)
        router_mask = (choices < E)[None, :, None] & (columns < D)
        acc += xs * tl.load(router + choices[None, :, None] * D + columns, mask=router_mask, other=0.0)
    logits = tl.where((choices < E)[None, :], tl.sum(acc, 2), -float("inf"))  # [BT, E_PAD]
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    left = powers / tl.sum(powers, 1)[:, None]
    left = tl.where(left == left, left, 0.0)  # a broken row is sent to the first experts, with weights of 0 / 0
    slots = tl.arange(0, K_PAD)
    chosen = tl.zeros((BLOCK_T, K_PAD), tl.int32)
    chosen_weights = tl.zeros((BLOCK_T, K_PAD), tl.float32)
    for k in tl.static_range(TOP_K):
        expert = tl.argmax(left, 1)  # the first of equals, as torch's stable sort
        here = slots[None, :] == k
        chosen = tl.where(here, expert[:, None], chosen)
        chosen_weights = tl.where(here, tl.max(left, 1)[:, None], chosen_weights)
        left = tl.where(choices[None, :] == expert[:, None], -1.0, left)
    chosen_weights = chosen_weights / tl.sum(chosen_weights, 1)[:, None]
    place = tokens[:, None] * TOP_K + slots[None, :]
    mask = known[:, None] & (slots < TOP_K)[None, :]
    tl.store(experts + place, chosen, mask=mask)
    tl.store(weights + place, chosen_weights, mask=mask)


@operator("route")
def route(x: Tensor, router: Tensor, top_k: int, num_valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Top-k of the router's softmax, renormalised. x [T, D], router float32 [E, D] -> float32 and int32 [T, K].

    With num_valid, int32 [1], only the first so many tokens are routed; the others' rows are left as memory was.
    """
    assert x.is_contiguous(), x.stride()
    assert router.is_contiguous(), router.stride()
    num_tokens, hidden = x.shape
    num_experts = len(router)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=x.device)
    experts = torch.empty(num_tokens, top_k, dtype=torch.int32, device=x.device)
    padded = next_power_of_2(num_experts)
    _route_kernel[(cdiv(num_tokens, _ROUTE_TOKENS),)](
        x,
        router,
        weights,
        experts,
        num_valid,
        num_tokens,
        D=hidden,
        E=num_experts,
        TOP_K=top_k,
        E_PAD=padded,
        K_PAD=next_power_of_2(top_k),
        BLOCK_T=_ROUTE_TOKENS,
        BLOCK_D=max(16, _ROUTE_ELEMENTS // (_ROUTE_TOKENS * padded)),
        num_warps=8,
    )
    return weights, experts


@route.register_fake
def _(x: Tensor, router: Tensor, top_k: int, num_valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shape = (len(x), top_k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


@kernel("num_pairs")
def _sort_kernel(
    experts,
    order,
    offsets,
    counts,
    num_valid,
    num_pairs,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A stable counting sort in one launch: every program counts all pairs itself, which for 128k pairs is 0.5 MB of
    L2 reads a program, rather than waiting for a launch that counts."""
    if num_valid is not None:
        num_pairs = tl.minimum(num_pairs, tl.load(num_valid) * TOP_K)
    first = tl.program_id(0) * BLOCK
    choices = tl.arange(0, E_PAD)
    places = tl.arange(0, BLOCK)
    total = tl.zeros((E_PAD,), tl.int32)
    before = tl.zeros((E_PAD,), tl.int32)  # pairs of each expert ahead of this program's
    for start in range(0, num_pairs, BLOCK):
        expert = tl.load(experts + start + places, mask=start + places < num_pairs, other=E_PAD)
        chosen = tl.sum((expert[:, None] == choices[None, :]).to(tl.int32), 0)
        total += chosen
        before += tl.where(start < first, chosen, 0)
    begin = tl.cumsum(total) - total
    if tl.program_id(0) == 0:
        tl.store(offsets + choices, begin, mask=choices < E)
        tl.store(offsets + E, num_pairs)
        if counts is not None:
            known = tl.load(counts + choices, mask=choices < E, other=0)
            tl.store(counts + choices, known + total, mask=choices < E)
    pairs = first + places
    expert = tl.load(experts + pairs, mask=pairs < num_pairs, other=E_PAD)
    mine = (expert[:, None] == choices[None, :]).to(tl.int32)
    rank = tl.cumsum(mine, 0) - 1 + (begin + before)[None, :]
    tl.store(order + tl.sum(mine * rank, 1), pairs, mask=pairs < num_pairs)


@operator("sort_pairs", mutates_args=("counts",))
def sort_pairs(
    experts: Tensor, num_experts: int, counts: Tensor | None, num_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pairs by expert, in their own order within one. experts int32 [T, K] -> order int32 [P], offsets int32 [E + 1].

    With num_valid, int32 [1], only pairs of the first so many tokens are sorted: offsets[E] is their number, and `order`
    beyond it is left as memory was. counts int64 [E], where given, grows by each expert's sorted pairs.
    """
    assert experts.is_contiguous(), experts.stride()
    num_pairs = experts.numel()
    order = torch.empty(num_pairs, dtype=torch.int32, device=experts.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=experts.device)
    padded = next_power_of_2(num_experts)
    block = min(1024, max(16, _SORT_ELEMENTS // padded))  # more pairs spill, of however few experts
    # One program even of no pairs: the offsets are read whatever the number is.
    _sort_kernel[(max(1, cdiv(num_pairs, block)),)](
        experts,
        order,
        offsets,
        counts,
        num_valid,
        num_pairs,
        E=num_experts,
        TOP_K=experts.shape[1],
        E_PAD=padded,
        BLOCK=block,
        num_warps=4,
    )
    return order, offsets


@sort_pairs.register_fake
def _(experts: Tensor, num_experts: int, counts: Tensor | None, num_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    return experts.new_empty(experts.numel()), experts.new_empty(num_experts + 1)
