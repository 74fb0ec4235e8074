"""Mixtral's expert feed-forward: route, sort (token, expert) pairs by expert, two grouped products, combine.

Legend: T tokens, K experts per token, P = T*K pairs, D hidden, F expert hidden, E experts. Pair t*K + k is the k-th
choice of token t. Everything runs on the device with grids that depend on T alone, so that a CUDA graph can hold it, and
an output row's bits depend on its own token alone: sums run in fixed orders and there are no atomics.

    route         x [T, D] -> weights, experts [T, K]
    sort_pairs    experts -> order [P]: pairs, expert by expert; offsets [E + 1]: where each expert's begin
    experts_up    x -> silu(x w1^T) * (x w3^T), [P, F] in sorted order; gathers its rows of x as it loads them
    experts_down  [P, F] -> weight * (h w2^T), [P, D] in pair order
    combine       [P, D] -> [T, D], a token's K rows summed in router order, plus the residual
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from batchmix.kernels import tiles
from batchmix.kernels.gemm import (
    BLOCK_SCALE,
    broadcast_m,
    broadcast_n,
    can_describe,
    descriptor,
    load_tile,
    step,
    to_row_major,
    weight_descriptor,
    zeros,
)
from batchmix.kernels.gpu import current_gpu
from batchmix.kernels.launch import cdiv, kernel, next_power_of_2, operator
from batchmix.kernels.quantize import FP8, quantize_rows
from batchmix.kernels.routing import route, sort_pairs
from batchmix.kernels.tiles import Tile


@kernel()
def _permute_kernel(x, order, offsets, out, D: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if row >= tl.load(offsets + E):  # a pair of padding
        return
    token = tl.load(order + row) // TOP_K
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + token.to(tl.int64) * D + columns, mask=columns < D)
    tl.store(out + row.to(tl.int64) * D + columns, values, mask=columns < D)


@kernel()
def _experts_kernel(
    x,  # [T, D] or sorted [P, K], or a descriptor of the latter
    w,  # [E * rows, K] as FORMAT packs it, or a descriptor
    x_scale,  # fp8: one a row of x before sorting
    w_scale,
    order,
    offsets,
    pair_weights,  # down only
    out,
    N: tl.constexpr,  # columns of the output
    K: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    FORMAT: tl.constexpr,
    UP: tl.constexpr,  # gate and up from w13 and SwiGLU, else w2 and the routing weight
    GATHER: tl.constexpr,  # x is [T, D]: row p is token order[p] // TOP_K
    X_DESCRIPTOR: tl.constexpr,
    W_DESCRIPTOR: tl.constexpr,
    SWAP_AB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    ROWS: tl.constexpr = 2 * N if UP else N  # of one expert's weights
    PACK: tl.constexpr = 4 if FORMAT == "int4" else 2 if FORMAT == "int8" else 1  # weights in a loaded element
    W_WIDTH: tl.constexpr = BLOCK_K // PACK
    X_WIDTH: tl.constexpr = BLOCK_K // 2 if FORMAT == "int4" else BLOCK_K
    STEP_SCALE: tl.constexpr = FORMAT == "int4" or FORMAT == "fp8_block"
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    GROUP: tl.constexpr = GROUP_M * TILES_N

    choices = tl.arange(0, E_PAD)
    begins = tl.load(offsets + choices, mask=choices < E, other=0)
    ends = tl.load(offsets + choices + 1, mask=choices < E, other=0)
    sizes = (ends - begins + BLOCK_M - 1) // BLOCK_M * TILES_N  # tiles of each expert
    lasts = tl.cumsum(sizes)

    for tile in tl.range(tl.program_id(0), tl.sum(sizes), tl.num_programs(0)):
        expert = tl.sum((lasts <= tile).to(tl.int32))
        chosen = choices == expert
        end = tl.sum(tl.where(chosen, ends, 0))
        begin = tl.sum(tl.where(chosen, begins, 0))
        # Within an expert: GROUP_M row tiles at a time against every column of weights, row tiles fastest.
        local = tile - tl.sum(tl.where(chosen, lasts - sizes, 0))
        tiles_m = (end - begin + BLOCK_M - 1) // BLOCK_M
        first_m = local // GROUP * GROUP_M
        height = tl.minimum(tiles_m - first_m, GROUP_M)
        start = begin + (first_m + local % GROUP % height) * BLOCK_M
        column = local % GROUP // height * BLOCK_N

        # Rows and columns beyond the last repeat it and are not stored: loads need no masks.
        offs_m = start + tl.arange(0, BLOCK_M)
        valid = offs_m < end
        offs_m = tl.minimum(offs_m, end - 1)
        pairs = tl.load(order + offs_m)
        columns = column + tl.arange(0, BLOCK_N)
        channels = expert * ROWS + tl.minimum(columns, N - 1)
        source = pairs // TOP_K if GATHER else offs_m
        x_pointers = x
        if not X_DESCRIPTOR:
            x_pointers = x + source.to(tl.int64)[:, None] * K + tl.arange(0, X_WIDTH)[None, :]
        w_pointers, up_pointers = w, w
        if not W_DESCRIPTOR:
            w_offsets = channels.to(tl.int64)[:, None] * (K // PACK) + tl.arange(0, W_WIDTH)[None, :]
            w_pointers = w + w_offsets
            up_pointers = w_pointers + N * (K // PACK)
        row = expert * ROWS + column
        scales, up_scales = w_scale, w_scale
        if FORMAT == "int4":
            scales = w_scale + channels * (K // BLOCK_SCALE)
            up_scales = scales + N * (K // BLOCK_SCALE)
        if FORMAT == "fp8_block":  # blocks are counted from the expert's first row, so one may hold gate and up
            channel = tl.minimum(columns, N - 1)
            BLOCKS_K: tl.constexpr = (K + BLOCK_SCALE - 1) // BLOCK_SCALE
            scales = w_scale + expert * ((ROWS + BLOCK_SCALE - 1) // BLOCK_SCALE) * BLOCKS_K
            up_scales = scales + (channel + N) // BLOCK_SCALE * BLOCKS_K
            scales += channel // BLOCK_SCALE * BLOCKS_K

        acc = zeros(BLOCK_M, BLOCK_N, SWAP_AB)
        acc_up = zeros(BLOCK_M, BLOCK_N, SWAP_AB) if UP else 0.0
        for k in tl.range(0, K, BLOCK_K):
            x_tile = load_tile(x, start, x_pointers, k, K, X_WIDTH, X_DESCRIPTOR)
            x_high = x_tile
            if FORMAT == "int4":
                x_high = load_tile(x, start, x_pointers, k + X_WIDTH, K, X_WIDTH, X_DESCRIPTOR)
            w_tile = load_tile(w, row, w_pointers, k // PACK, K // PACK, W_WIDTH, W_DESCRIPTOR)
            scale = tl.load(scales + k // BLOCK_SCALE) if STEP_SCALE else 1.0
            acc = step(w_tile, x_tile, x_high, scale, acc, FORMAT, SWAP_AB)
            if UP:
                w_tile = load_tile(w, row + N, up_pointers, k // PACK, K // PACK, W_WIDTH, W_DESCRIPTOR)
                scale = tl.load(up_scales + k // BLOCK_SCALE) if STEP_SCALE else 1.0
                acc_up = step(w_tile, x_tile, x_high, scale, acc_up, FORMAT, SWAP_AB)

        if FORMAT == "fp8" or FORMAT == "int8":
            acc *= broadcast_n(tl.load(w_scale + channels), SWAP_AB)
            if UP:
                acc_up *= broadcast_n(tl.load(w_scale + N + channels), SWAP_AB)
        if FORMAT == "fp8" or FORMAT == "fp8_block":
            x_scales = broadcast_m(tl.load(x_scale + (pairs // TOP_K if UP else offs_m)), SWAP_AB)
            acc *= x_scales
            if UP:
                acc_up *= x_scales
        if UP:
            acc = acc / (1.0 + tl.exp(-acc)) * acc_up
            rows_out = offs_m
        else:
            acc *= broadcast_m(tl.load(pair_weights + pairs), SWAP_AB)
            rows_out = pairs
        out_pointers = out + rows_out.to(tl.int64)[:, None] * N + columns[None, :]
        result = to_row_major(acc, SWAP_AB).to(out.dtype.element_ty)
        tl.store(out_pointers, result, mask=valid[:, None] & (columns < N)[None, :])


def _weight_format(w: Tensor, scale: Tensor | None) -> str:
    """The kernel's FORMAT of stacked weights and their scales."""
    if scale is None:
        return "dense"
    if w.dtype == FP8:
        return "fp8" if scale.dim() == 2 else "fp8_block"
    return {torch.int8: "int8", torch.uint8: "int4"}[w.dtype]


def _tile(kind: str, x: Tensor, w: Tensor, scale: Tensor | None, pairs: int, batch_invariant: bool) -> Tile:
    format = _weight_format(w, scale)
    name = tiles.format_of(w.dtype) if format == "dense" else format
    columns = w.shape[1] // 2 if kind == "up" else w.shape[1]
    rows = cdiv(pairs, len(w))  # of an average expert
    return tiles.select_tile(kind, name, columns, x.shape[1], rows, current_gpu(x.device), batch_invariant)


def launch_experts(
    x: Tensor,
    x_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    pair_weights: Tensor | None,
    out: Tensor,
    top_k: int,
    tile: Tile,
) -> None:
    """The grouped product with a given tile, into `out`; `experts_up` without pair_weights, else `experts_down`."""
    up = pair_weights is None
    format = _weight_format(w, w_scale)
    pairs, columns = out.shape
    assert all(tensor is None or tensor.is_contiguous() for tensor in (x, x_scale, w, w_scale, pair_weights))
    if not pairs:  # TMA has no descriptor of an empty matrix
        return
    num_experts, depth = w.shape[0], x.shape[1]
    gather = up
    if up and tile.permute:
        permuted = torch.empty(pairs, depth, dtype=x.dtype, device=x.device)
        _permute_kernel[(pairs, cdiv(depth, 4096))](
            x,
            order,
            offsets,
            permuted,
            D=depth,
            E=num_experts,
            TOP_K=top_k,
            BLOCK=4096,
            num_warps=4,
        )
        x, gather = permuted, False
    loaded = torch.int16 if format in ("int8", "int4") else w.dtype  # the former are loaded two bytes at a time
    w_width = tile.block_k * w.shape[2] * w.itemsize // (depth * loaded.itemsize)
    x_width = tile.block_k // 2 if format == "int4" else tile.block_k
    x_described = tile.tma and not gather and can_describe(x)
    described = weight_descriptor(w, [tile.block_n, w_width], loaded) if tile.tma else None
    gpu = current_gpu(x.device)
    most = (cdiv(pairs, tile.block_m) + num_experts) * cdiv(columns, tile.block_n)
    _experts_kernel[(min(most, gpu.num_sms * tile.programs_per_sm),)](
        descriptor(x, [tile.block_m, x_width]) if x_described else x,
        w.view(loaded) if described is None else described,
        x_scale,
        w_scale,
        order,
        offsets,
        pair_weights,
        out,
        N=columns,
        K=depth,
        E=num_experts,
        E_PAD=next_power_of_2(num_experts),
        TOP_K=top_k,
        FORMAT=format,
        UP=up,
        GATHER=gather,
        X_DESCRIPTOR=x_described,
        W_DESCRIPTOR=described is not None,
        SWAP_AB=tile.swap_ab,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@operator("experts_up")
def experts_up(
    x: Tensor,
    x_scale: Tensor | None,
    w13: Tensor,
    w13_scale: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    """SwiGLU of each pair's token and expert: x [T, D], w13 [E, 2F, D] (gate, then up) -> `dtype` [P, F], sorted.

    w13_scale None: w13 has x's dtype. Else as kernels/quantize.py makes them: fp8 [E, 2F, D] with float32 scales
    [E, 2F] or of 128 x 128 blocks, x fp8 with x_scale float32 [T]; int8 [E, 2F, D] with [E, 2F]; int4 in uint8
    [E, 2F, D/2] with [E, 2F, D/128]. order and offsets are `sort_pairs`'.
    """
    out = torch.empty(len(order), w13.shape[1] // 2, dtype=dtype, device=x.device)
    tile = _tile("up", x, w13, w13_scale, len(order), batch_invariant)
    launch_experts(x, x_scale, w13, w13_scale, order, offsets, None, out, top_k, tile)
    return out


@experts_up.register_fake
def _(
    x: Tensor,
    x_scale: Tensor | None,
    w13: Tensor,
    w13_scale: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    return x.new_empty(len(order), w13.shape[1] // 2, dtype=dtype)


@operator("experts_down")
def experts_down(
    h: Tensor,
    h_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    pair_weights: Tensor,
    dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    """The experts' outputs times the routing weights. h [P, F] sorted, w2 [E, D, F] -> `dtype` [P, D] in pair order.

    Formats as for `experts_up`, with h_scale float32 [P] sorted. pair_weights float32 [P] in pair order.
    """
    out = torch.empty(len(order), w2.shape[1], dtype=dtype, device=h.device)
    tile = _tile("down", h, w2, w2_scale, len(order), batch_invariant)
    launch_experts(h, h_scale, w2, w2_scale, order, offsets, pair_weights, out, 1, tile)
    return out


@experts_down.register_fake
def _(
    h: Tensor,
    h_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    pair_weights: Tensor,
    dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    return h.new_empty(len(order), w2.shape[1], dtype=dtype)


@kernel()
def _combine_kernel(y, residual, num_valid, out, D: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    worked_on = mask
    if num_valid is not None:
        worked_on &= token < tl.load(num_valid)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        total += tl.load(y + (token * TOP_K + k) * D + columns, mask=worked_on, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + token * D + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * D + columns, total.to(out.dtype.element_ty), mask=mask)


@operator("combine")
def combine(y: Tensor, top_k: int, residual: Tensor | None = None, num_valid: Tensor | None = None) -> Tensor:
    """Each token's K rows summed in router order, then plus the residual, in float32. y [P, D], [T, D] -> [T, D].

    With num_valid, int32 [1], tokens from there on get the residual alone: no expert worked on them.
    """
    assert y.is_contiguous(), y.stride()
    assert residual is None or residual.is_contiguous()
    num_tokens, hidden = len(y) // top_k, y.shape[1]
    out = torch.empty(num_tokens, hidden, dtype=y.dtype, device=y.device)
    block = min(1024, next_power_of_2(hidden))
    _combine_kernel[(num_tokens, cdiv(hidden, block))](
        y,
        residual,
        num_valid,
        out,
        D=hidden,
        TOP_K=top_k,
        BLOCK=block,
        num_warps=4,
    )
    return out


@combine.register_fake
def _(y: Tensor, top_k: int, residual: Tensor | None = None, num_valid: Tensor | None = None) -> Tensor:
    return y.new_empty(len(y) // top_k, y.shape[1])


def moe(
    x: Tensor,
    router: Tensor,
    w13: Tensor,
    w2: Tensor,
    top_k: int,
    *,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    residual: Tensor | None = None,
    batch_invariant: bool = False,
    counts: Tensor | None = None,
    num_valid: Tensor | None = None,
) -> Tensor:
    """Top-k of E SwiGLU experts, their outputs weighted by the renormalised router probabilities.

    x [T, D], router float32 [E, D], w13 [E, 2F, D] (gate, then up), w2 [E, D, F] -> [T, D], plus the residual [T, D].
    Quantised weights as kernels/quantize.py makes them, with their scales; for fp8 the activations are quantised too,
    by row. `batch_invariant`: the same tile for any T, where else tiles of one order of sums follow T.
    With num_valid, int32 [1] on the device, tokens from there on are padding: no expert works on them, and they get the
    residual alone. counts int64 [E], where given, grows by the tokens of each expert.
    """
    weights, experts = route(x, router, top_k, num_valid)
    order, offsets = sort_pairs(experts, len(router), counts, num_valid)
    quantised = w13.dtype == FP8
    rows, scale = quantize_rows(x, FP8) if quantised else (x, None)
    h = experts_up(rows, scale, w13, w13_scale, order, offsets, top_k, x.dtype, batch_invariant)
    rows, scale = quantize_rows(h, FP8) if quantised else (h, None)
    y = experts_down(rows, scale, w2, w2_scale, order, offsets, weights.view(-1), x.dtype, batch_invariant)
    combined: Tensor = combine(y, top_k, residual, num_valid)
    return combined
