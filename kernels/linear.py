"""y = x w^T for the dense projections, one program a streaming multiprocessor going over output tiles.

What it has over cuBLAS is that a row's bits do not depend on the other rows: the sum over K runs from 0 to K in steps
of one size in one program, never split, and `batch_invariant` fixes the whole tile.

Legend: T tokens, K input features, N output features.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from batchmix.kernels import tiles
from batchmix.kernels.gemm import can_describe, descriptor, load_tile, product, to_row_major, zeros
from batchmix.kernels.gpu import current_gpu
from batchmix.kernels.launch import cdiv, kernel, operator
from batchmix.kernels.tiles import Tile


@kernel("num_tokens")
def _linear_kernel(
    x,  # [T, K] or a descriptor
    w,  # [N, K] or a descriptor
    out,
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr,
    W_DESCRIPTOR: tl.constexpr,
    SWAP_AB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    GROUP: tl.constexpr = GROUP_M * TILES_N
    tiles_m = (num_tokens + BLOCK_M - 1) // BLOCK_M
    for tile in tl.range(tl.program_id(0), tiles_m * TILES_N, tl.num_programs(0)):
        # GROUP_M row tiles at a time against every column of weights, row tiles fastest.
        first_m = tile // GROUP * GROUP_M
        height = tl.minimum(tiles_m - first_m, GROUP_M)
        start = (first_m + tile % GROUP % height) * BLOCK_M
        column = tile % GROUP // height * BLOCK_N

        # Rows and columns beyond the last repeat it and are not stored: loads need no masks.
        rows = start + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        x_pointers, w_pointers = x, w
        if not X_DESCRIPTOR:
            known = tl.minimum(rows, num_tokens - 1).to(tl.int64)
            x_pointers = x + known[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
        if not W_DESCRIPTOR:
            known = tl.minimum(columns, N - 1).to(tl.int64)
            w_pointers = w + known[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
        acc = zeros(BLOCK_M, BLOCK_N, SWAP_AB)
        for k in tl.range(0, K, BLOCK_K):
            x_tile = load_tile(x, start, x_pointers, k, K, BLOCK_K, X_DESCRIPTOR)
            w_tile = load_tile(w, column, w_pointers, k, K, BLOCK_K, W_DESCRIPTOR)
            acc = product(w_tile, x_tile, acc, SWAP_AB)
        out_pointers = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
        mask = (rows < num_tokens)[:, None] & (columns < N)[None, :]
        tl.store(out_pointers, to_row_major(acc, SWAP_AB).to(out.dtype.element_ty), mask=mask)


def launch_linear(x: Tensor, w: Tensor, out: Tensor, tile: Tile) -> None:
    """x w^T with a given tile, into `out`; shapes as `linear`."""
    num_tokens, depth = x.shape
    columns = len(w)
    assert x.is_contiguous(), x.stride()
    assert w.is_contiguous(), w.stride()
    if not num_tokens:  # TMA has no descriptor of an empty matrix
        return
    x_described, w_described = tile.tma and can_describe(x), tile.tma and can_describe(w)
    most = cdiv(num_tokens, tile.block_m) * cdiv(columns, tile.block_n)
    _linear_kernel[(min(most, current_gpu(x.device).num_sms * tile.programs_per_sm),)](
        descriptor(x, [tile.block_m, tile.block_k]) if x_described else x,
        descriptor(w, [tile.block_n, tile.block_k]) if w_described else w,
        out,
        num_tokens,
        N=columns,
        K=depth,
        X_DESCRIPTOR=x_described,
        W_DESCRIPTOR=w_described,
        SWAP_AB=tile.swap_ab,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@operator("linear")
def linear(x: Tensor, w: Tensor, batch_invariant: bool = True) -> Tensor:
    """x w^T, summed in float32. x [T, K] and w [N, K] of one dtype, contiguous -> [T, N]."""
    num_tokens, depth = x.shape
    out = torch.empty(num_tokens, len(w), dtype=x.dtype, device=x.device)
    gpu = current_gpu(x.device)
    format = tiles.format_of(x.dtype)
    launch_linear(x, w, out, tiles.select_tile("linear", format, len(w), depth, num_tokens, gpu, batch_invariant))
    return out


@linear.register_fake
def _(x: Tensor, w: Tensor, batch_invariant: bool = True) -> Tensor:
    return x.new_empty(len(x), len(w))
