"""Attention of one new token per row over its paged context, and over blocks that rows share.

A row's context is cut into splits of SPLIT tokens, counted from the row's beginning. Each split is attended to alone,
then a row's splits are merged by their log-sum-exp in order (FlashDecoding, Dao et al. 2023). Where several rows have
the same blocks in a split, that split is attended to once for all of them, as one product (Hydragen, Juravsky et al.
2024). Splits are the same for a row that shares and one that does not, so sharing need not change a bit: on NVIDIA, for
head dim 64 and up, both kernels compile to the same mma.sync (their tiles are below wgmma's 64 rows), warps side by side
over the keys, so that a row's products and sums have one order, and neither fuses what the other does not (`attend_tile`).
(gfx942 takes other instructions for the taller tile.)

Legend: B rows, H heads, G kv heads, R = H / G, C head dim, S block size, W blocks per table row, N splits of a row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (a jitted function has no types that mypy could see; launchers are fully typed)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchmix.kernels.gpu import Gpu, current_gpu
from batchmix.kernels.launch import kernel, next_power_of_2, operator
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
from batchmix.kernels.shared_splits import SPLIT, SharedSplits, pair_tile

_MERGE_TILE = 8
_PROGRAMS_PER_SM = 16  # several times what fits at once, so that the hardware evens out uneven ones. Untuned


@triton.jit
def _attend_split(
    q, keys_ptr, values_ptr, k_scale_ptr, v_scale_ptr, table_ptr, low, end, kv_head, scale_stride, scale,
    G: tl.constexpr, S: tl.constexpr, C: tl.constexpr, KEY_TILE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q [M, C] against a row's tokens low..end-1 -> normalised values [M, C], log-sum-exp of the scores in base 2 [M]."""
    M: tl.constexpr = q.shape[0]
    scale *= head_scale(k_scale_ptr, scale_stride, kv_head)
    last = tl.full([M], end - 1, tl.int32)
    acc = tl.zeros([M, C], tl.float32)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for tile in range(low, end, KEY_TILE):
        acc, peak, total = attend_tile(
            acc, peak, total, q, last, table_ptr, keys_ptr, values_ptr, tile, end, kv_head, scale, G, S, C, KEY_TILE,
            MASKED, PRECISION,
        )  # fmt: skip
    out = acc / total[:, None] * head_scale(v_scale_ptr, scale_stride, kv_head)
    return out, peak + tl.log2(total)


@kernel("table_stride", "max_splits")
def decode_split_kernel(
    q_ptr, keys_ptr, values_ptr, k_scale_ptr, v_scale_ptr, partial_ptr, lse_ptr, items_ptr, num_items_ptr, context_ptr,
    table_ptr, q_stride, table_stride, scale_stride, max_splits, scale,
    H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, C: tl.constexpr, PRODUCT: tl.constexpr,
    HEAD_TILE: tl.constexpr, SPLIT: tl.constexpr, KEY_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every (row, split) item of the list for every kv head, over as many programs as there are."""
    R: tl.constexpr = H // G
    column = tl.arange(0, C)
    lane = tl.arange(0, HEAD_TILE)
    real = lane < R
    jobs = tl.load(num_items_ptr) * G
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        kv_head = job % G
        row = tl.load(items_ptr + job // G * 2).to(tl.int64)
        split = tl.load(items_ptr + job // G * 2 + 1)
        low = split * SPLIT
        end = tl.minimum(low + SPLIT, tl.load(context_ptr + row))
        head = kv_head * R + lane
        q_pointers = q_ptr + row * q_stride + head[:, None] * C + column[None, :]
        q = tl.load(q_pointers, mask=real[:, None], other=0.0).to(PRODUCT)
        out, lse = _attend_split(
            q, keys_ptr, values_ptr, k_scale_ptr, v_scale_ptr, table_ptr + row * table_stride, low, end, kv_head,
            scale_stride, scale, G, S, C, KEY_TILE, True, PRECISION,
        )  # fmt: skip
        place = (row * max_splits + split) * H + head
        tl.store(partial_ptr + place[:, None] * C + column[None, :], out, mask=real[:, None])
        tl.store(lse_ptr + place, lse, mask=real)


@kernel("table_stride", "max_splits")
def decode_shared_kernel(
    q_ptr, keys_ptr, values_ptr, k_scale_ptr, v_scale_ptr, partial_ptr, lse_ptr, rows_ptr, split_ptr, table_ptr,
    q_stride, table_stride, scale_stride, max_splits, scale,
    H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, C: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr,
    PAIR_TILE: tl.constexpr, SPLIT: tl.constexpr, KEY_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One whole split for up to ROWS rows that have the same blocks in it."""
    R: tl.constexpr = H // G
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    first = tl.load(rows_ptr + item * ROWS).to(tl.int64)
    if first >= 0:
        low = tl.load(split_ptr + item) * SPLIT
        pair = tl.arange(0, PAIR_TILE)  # (row, head of the kv head), the head fastest
        inside = pair < ROWS * R
        row = tl.load(rows_ptr + item * ROWS + pair // R, mask=inside, other=-1).to(tl.int64)
        real = row >= 0
        head = kv_head * R + pair % R
        column = tl.arange(0, C)
        q_pointers = q_ptr + row[:, None] * q_stride + head[:, None] * C + column[None, :]
        q = tl.load(q_pointers, mask=real[:, None], other=0.0).to(PRODUCT)
        out, lse = _attend_split(
            q, keys_ptr, values_ptr, k_scale_ptr, v_scale_ptr, table_ptr + first * table_stride, low, low + SPLIT,
            kv_head, scale_stride, scale, G, S, C, KEY_TILE, False, PRECISION,
        )  # fmt: skip
        place = (row * max_splits + low // SPLIT) * H + head
        tl.store(partial_ptr + place[:, None] * C + column[None, :], out, mask=real[:, None])
        tl.store(lse_ptr + place, lse, mask=real)


@kernel("max_splits")
def decode_merge_kernel(
    partial_ptr, lse_ptr, context_ptr, out_ptr, max_splits,
    H: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, MERGE_TILE: tl.constexpr,
):  # fmt: skip
    """A row's splits weighted by 2**lse, in an order that depends on their number alone; zeros for a row of none."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    num_splits = tl.cdiv(tl.load(context_ptr + row), SPLIT)
    first = row * max_splits
    lane = tl.arange(0, MERGE_TILE)
    column = tl.arange(0, C)
    peaks = tl.full([MERGE_TILE], float("-inf"), tl.float32)
    for low in range(0, num_splits, MERGE_TILE):
        lse_pointers = lse_ptr + (first + low + lane) * H + head
        peaks = tl.maximum(peaks, tl.load(lse_pointers, mask=low + lane < num_splits, other=float("-inf")))
    peak = tl.max(peaks, 0)
    total = tl.zeros([MERGE_TILE], tl.float32)
    acc = tl.zeros([MERGE_TILE, C], tl.float32)
    for low in range(0, num_splits, MERGE_TILE):
        there = low + lane < num_splits
        place = (first + low + lane) * H + head
        weight = tl.exp2(tl.load(lse_ptr + place, mask=there, other=float("-inf")) - peak)
        part = tl.load(partial_ptr + place[:, None] * C + column[None, :], mask=there[:, None], other=0.0)
        total += weight
        acc += weight[:, None] * part
    weights = tl.sum(total, 0)
    out = tl.sum(acc, 0) / tl.where(weights > 0.0, weights, 1.0)
    tl.store(out_ptr + (row * H + head) * C + column, out.to(out_ptr.dtype.element_ty))


class DecodePlan(NamedTuple):
    """A step's rows and their splits: made once per step, `decode_attention`'s arguments in every layer."""

    block_table: Tensor  # int32 [B, W]
    context: Tensor  # int32 [B]
    items: Tensor  # int32 [B * N, 2]: row, split of it
    num_items: Tensor  # int32 [1]: how many of them there are
    shared_rows: Tensor  # as in SharedSplits
    shared_split: Tensor


def plan_decode(
    block_table: Tensor, context: Tensor, block_size: int, ratio: int, shared: SharedSplits | None = None
) -> DecodePlan:
    """List the splits that rows attend to on their own: a few small operators on the device, fit for a CUDA graph.

    block_table int32 [B, W]; context integers [B]: tokens that each row sees, the new one included, at most
    W * block_size; 0 for padding rows, which give zeros; ratio: H / G; shared: on the same device.
    """
    device, num_rows = context.device, len(context)
    if shared is None:
        rows_per_tile = pair_tile(ratio) // ratio
        nothing = torch.empty((0, rows_per_tile), dtype=torch.int32, device=device)
        shared = SharedSplits(nothing, nothing[:, 0], torch.zeros(num_rows, dtype=torch.int32, device=device))
    context = context.int()
    count = ((context + SPLIT - 1) // SPLIT - shared.first_own).clamp_(min=0)
    ends = count.cumsum(0)
    item = torch.arange(num_rows * _max_splits(block_table, block_size), device=device)
    row = torch.searchsorted(ends, item, right=True).clamp_(max=max(num_rows - 1, 0))
    split = item - (ends - count - shared.first_own)[row]
    items = torch.stack((row, split), 1).int()
    return DecodePlan(block_table, context, items, count.sum(0, True).int(), shared.rows, shared.split)


def _max_splits(block_table: Tensor, block_size: int) -> int:
    return -(-block_table.shape[1] * block_size // SPLIT)


def _tile(gpu: Gpu, dtype: torch.dtype) -> dict[str, int]:
    """Keys in a tile, warps and stages, the same for own and shared splits so that the bits are. Untuned."""
    if dtype == torch.float32:
        return {"KEY_TILE": 32, "num_warps": 4, "num_stages": 1}
    return {"KEY_TILE": 64, "num_warps": 4, "num_stages": num_stages(gpu)}


def attend_decode(
    q: Tensor, keys: Tensor, values: Tensor, plan: DecodePlan, scales: tuple[Tensor | None, Tensor | None], out: Tensor
) -> None:
    """Launch `decode_attention` into out [B, H, C], contiguous, as a part of a larger tensor is."""
    block_table, context, items, num_items, shared_rows, shared_split = plan
    check_cache(q, keys, values, *scales)
    rows, heads, dim = q.shape
    assert out.shape == q.shape, (out.shape, q.shape)
    assert out.is_contiguous()
    if not rows:
        return
    kv_heads, size = keys.shape[1:3]
    ratio = heads // kv_heads
    max_splits = _max_splits(block_table, size)
    gpu = current_gpu(q.device)
    partial = torch.empty((rows, max_splits, heads, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((rows, max_splits, heads), dtype=torch.float32, device=q.device)
    read = q, readable(keys, gpu), readable(values, gpu), *scales, partial, lse
    strides = q.stride(0), block_table.stride(0), scale_stride(scales[0]), max_splits, dim**-0.5 * LOG2_E
    options = {
        "H": heads, "G": kv_heads, "S": size, "C": dim, "PRODUCT": product_dtype(q.dtype, keys.dtype), "SPLIT": SPLIT,
        "PRECISION": float32_precision(gpu), "enable_fp_fusion": False, **_tile(gpu, q.dtype),
    }  # fmt: skip
    if len(shared_rows):
        decode_shared_kernel[(kv_heads, len(shared_rows))](
            *read, shared_rows, shared_split, block_table, *strides,
            ROWS=shared_rows.shape[1], PAIR_TILE=pair_tile(ratio), **options,
        )  # fmt: skip
    programs = min(len(items) * kv_heads, _PROGRAMS_PER_SM * gpu.num_sms)
    decode_split_kernel[(programs,)](
        *read, items, num_items, context, block_table, *strides,
        HEAD_TILE=max(16, next_power_of_2(ratio)), **options,
    )  # fmt: skip
    decode_merge_kernel[(heads, rows)](
        partial, lse, context, out, max_splits, H=heads, C=dim, SPLIT=SPLIT, MERGE_TILE=_MERGE_TILE, num_warps=1
    )


@operator("decode_attention")
def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    context: Tensor,
    items: Tensor,
    num_items: Tensor,
    shared_rows: Tensor,
    shared_split: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of one query per row to its first `context` tokens, scaled by C**-0.5.

    q [B, H, C] in float32, float16 or bfloat16, rows at any stride; keys and values [blocks, G, S, C] of q's dtype, or
    e4m3 with k_scale and v_scale float32 [G] or [1] (stored times scale = real); the rest as in `DecodePlan` ->
    [B, H, C] of q's dtype, zeros where context is 0. Takes a workspace of B * N * H * (C + 1) float32.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    plan = DecodePlan(block_table, context, items, num_items, shared_rows, shared_split)
    attend_decode(q, keys, values, plan, (k_scale, v_scale), out)
    return out


@decode_attention.register_fake
def _(q: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
