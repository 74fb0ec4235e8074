"""Causal attention of packed prompt chunks, whose keys and values are read from the paged cache.

A chunk is a run of tokens of one row, its own keys and values already in the cache: the first chunk of a prompt, a
later one, or what follows a prefix that rows share. A program takes a tile of (token, query head) pairs of one kv head,
so that keys are read once for all heads that share them, and goes over the row's keys in tiles that begin at multiples
of KEY_TILE whatever the chunk is: a token's sums run in one order wherever its prompt is cut, and whoever is beside it.
Tiled as in FlashAttention-2 (Dao 2023).

Legend: T packed tokens, N chunks, H heads, G kv heads, R = H / G, C head dim, S block size, W blocks per table row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (a jitted function has no types that mypy could see; launchers are fully typed)

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from batchmix.kernels.gpu import Gpu, current_gpu
from batchmix.kernels.launch import kernel, operator
from batchmix.kernels.paged_cache import (
    LOG2_E,
    attend_tile,
    check_cache,
    float32_precision,
    head_scale,
    num_stages,
    product_dtype,
    readable,
    scale_stride,
)


@kernel("table_stride")
def prefill_attention_kernel(
    q_ptr, keys_ptr, values_ptr, k_scale_ptr, v_scale_ptr, out_ptr, tiles_ptr, chunks_ptr, table_ptr, q_stride,
    table_stride, scale_stride, scale,
    H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, C: tl.constexpr, PRODUCT: tl.constexpr,
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = H // G
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    chunk = tl.load(tiles_ptr + tile * 2)
    first = tl.load(tiles_ptr + tile * 2 + 1)
    offset = tl.load(chunks_ptr + chunk * 3)
    start = tl.load(chunks_ptr + chunk * 3 + 1)
    length = tl.load(chunks_ptr + chunk * 3 + 2)
    table_ptr += chunk.to(tl.int64) * table_stride

    pair = first + tl.arange(0, QUERY_TILE)  # (token, head of the kv head), the head fastest
    real = pair < length * R
    token = tl.minimum(pair // R, length - 1)
    head = kv_head * R + pair % R
    packed = (offset + token).to(tl.int64)
    column = tl.arange(0, C)
    q = tl.load(q_ptr + packed[:, None] * q_stride + head[:, None] * C + column[None, :], mask=real[:, None], other=0.0)
    q = q.to(PRODUCT)
    scale *= head_scale(k_scale_ptr, scale_stride, kv_head)

    acc = tl.zeros([QUERY_TILE, C], tl.float32)
    peak = tl.full([QUERY_TILE], float("-inf"), tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)
    seen_by_all = tl.maximum(start + first // R + 1, 0) // KEY_TILE * KEY_TILE
    end = start + tl.minimum((first + QUERY_TILE - 1) // R + 1, length)  # 0 for padding: no keys at all
    for low in range(0, seen_by_all, KEY_TILE):
        acc, peak, total = attend_tile(
            acc, peak, total, q, start + token, table_ptr, keys_ptr, values_ptr, low, end, kv_head, scale, G, S, C,
            KEY_TILE, False, PRECISION,
        )  # fmt: skip
    for low in range(seen_by_all, end, KEY_TILE):
        acc, peak, total = attend_tile(
            acc, peak, total, q, start + token, table_ptr, keys_ptr, values_ptr, low, end, kv_head, scale, G, S, C,
            KEY_TILE, True, PRECISION,
        )  # fmt: skip
    total = tl.where(total > 0.0, total, 1.0)
    out = acc / total[:, None] * head_scale(v_scale_ptr, scale_stride, kv_head)
    out_pointers = out_ptr + (packed[:, None] * H + head[:, None]) * C + column[None, :]
    tl.store(out_pointers, out.to(out_ptr.dtype.element_ty), mask=real[:, None])


class PrefillPlan(NamedTuple):
    """How a step's chunks are cut into programs: made once per step, `prefill_attention`'s arguments in every layer."""

    chunks: Tensor  # int32 [N, 3]: packed offset, position in the row, length; padding has position -length
    tiles: Tensor  # int32 [M, 2]: chunk, first (token, head) pair of it; most keys first
    block_table: Tensor  # int32 [N, W]; chunks that are padding come last and have no row
    query_tile: int


def plan_prefill(
    chunks: Sequence[tuple[int, int, int]], block_table: Tensor, num_tokens: int, ratio: int, dtype: torch.dtype
) -> PrefillPlan:
    """Lay out a step.

    chunks: (packed offset, position in the row, length) each, ascending and apart; block_table int32 [N, W], on the
    device: the blocks of each chunk's row; num_tokens: T, of which those in no chunk get zeros; ratio: H / G; dtype: of
    the queries. Tiles come longest first, so that the last ones to run are short.
    """
    gaps, end = [], 0
    for offset, _, length in [*chunks, (num_tokens, 0, 0)]:
        if offset > end:
            gaps.append((end, end - offset, offset - end))
        end = offset + length
    query_tile = _query_tile(dtype)
    chunks = [*chunks, *gaps]
    tiles = [
        (start + min((first + query_tile - 1) // ratio, length - 1), chunk, first)
        for chunk, (_, start, length) in enumerate(chunks)
        for first in range(0, length * ratio, query_tile)
    ]
    tiles.sort(key=lambda tile: -tile[0])
    # torch.tensor(..., device=) would wait for all that the device has been given to do.
    listed = torch.tensor(chunks, dtype=torch.int32).to(block_table.device, non_blocking=True)
    cut = torch.tensor([tile[1:] for tile in tiles], dtype=torch.int32).to(block_table.device, non_blocking=True)
    return PrefillPlan(listed.view(-1, 3), cut.view(-1, 2), block_table, query_tile)


def _query_tile(dtype: torch.dtype) -> int:
    return 32 if dtype == torch.float32 else 128


def _tile(gpu: Gpu, dtype: torch.dtype) -> dict[str, int]:
    """Keys in a tile, warps and stages. Untuned: what fits into shared memory and registers.

    With 64 keys mma.sync, whose operands are in registers too, spills at head dim 128. float32, which is for tests,
    spills a little with 32.
    """
    if dtype == torch.float32:
        return {"KEY_TILE": 32, "num_warps": 4, "num_stages": 1}
    small = gpu.arch.startswith("sm_") and not gpu.has_tensor_memory_accelerator
    return {"KEY_TILE": 32 if small else 64, "num_warps": 8, "num_stages": num_stages(gpu)}


def attend_prefill(
    q: Tensor, keys: Tensor, values: Tensor, plan: PrefillPlan, scales: tuple[Tensor | None, Tensor | None], out: Tensor
) -> None:
    """Launch `prefill_attention` into out [T, H, C], contiguous, as a part of a larger tensor is."""
    chunks, tiles, block_table, query_tile = plan
    check_cache(q, keys, values, *scales)
    _, heads, dim = q.shape
    assert out.shape == q.shape, (out.shape, q.shape)
    assert out.is_contiguous()
    kv_heads, size = keys.shape[1:3]
    gpu = current_gpu(q.device)
    if len(tiles):
        prefill_attention_kernel[(kv_heads, len(tiles))](
            q, readable(keys, gpu), readable(values, gpu), *scales, out, tiles, chunks, block_table,
            q.stride(0), block_table.stride(0), scale_stride(scales[0]), dim**-0.5 * LOG2_E,
            H=heads, G=kv_heads, S=size, C=dim, PRODUCT=product_dtype(q.dtype, keys.dtype), QUERY_TILE=query_tile,
            PRECISION=float32_precision(gpu), enable_fp_fusion=False, **_tile(gpu, q.dtype),
        )  # fmt: skip


@operator("prefill_attention")
def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    chunks: Tensor,
    tiles: Tensor,
    block_table: Tensor,
    query_tile: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed chunks, scaled by C**-0.5.

    q [T, H, C] in float32, float16 or bfloat16, tokens at any stride; keys and values [blocks, G, S, C] of q's dtype,
    or e4m3 with k_scale and v_scale float32 [G] or [1] (stored times scale = real); chunks, tiles, block_table and
    query_tile as in `PrefillPlan` -> [T, H, C] of q's dtype, zeros for tokens in no chunk.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    attend_prefill(q, keys, values, PrefillPlan(chunks, tiles, block_table, query_tile), (k_scale, v_scale), out)
    return out


@prefill_attention.register_fake
def _(q: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
