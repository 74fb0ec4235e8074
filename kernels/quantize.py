"""Weights and activations in 8 and 4 bits, and back.

All formats are symmetric around zero. With `limit` the largest code and `part` the elements that share a scale,

    scale = max(max |part| / limit, 2^-126)        float32; the floor keeps 1 / scale finite for zeros and subnormals
    code  = round(clamp(x * (1 / scale), -limit, limit))          to nearest, ties to even, never a negative zero
    value = code * scale

| format     | limit | part                   | stored as                                                              |
|------------|-------|------------------------|------------------------------------------------------------------------|
| fp8 (e4m3) | 448   | row, or 128x128 block  | float8_e4m3fn; Micikevicius et al. 2022, "FP8 formats for deep learning" |
| int8       | 127   | row                    | int8                                                                   |
| int4       | 7     | 128 elements along K   | code + 8 in a nibble, two in a byte                                    |

A row of a weight [.., N, K] is an output channel, a row of activations [T, K] a token. A group of 128 int4 codes is 64
bytes: byte j holds element j in its low nibble and element 64 + j in its high nibble, so that a kernel unpacks two
contiguous halves of K with one mask and one shift. Code -8 is never written, but is read as it should be.

A part with an infinity or a NaN cannot be refused without a synchronisation: its scale is infinite or NaN and its codes
are 0, so everything computed from it is NaN.

Legend: T tokens, N output channels, K input channels.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchmix.kernels.launch import cdiv, kernel, next_power_of_2, operator

FP8 = torch.float8_e4m3fn
BLOCK = 128  # side of an fp8 weight block
GROUP = 128  # int4 elements that share a scale
LIMITS = {FP8: 448.0, torch.int8: 127.0}
INT4_LIMIT = 7.0

_MAX_ROW = 65536  # a row stays in the registers of one block: 128 values a thread at 16 warps
_GROUPS_PER_PROGRAM = 32
_ROUND: tl.constexpr = tl.constexpr(1.5 * 2.0**23)  # adding it rounds |y| < 2^22 to an integer, ties to even
_SMALLEST_SCALE: tl.constexpr = tl.constexpr(2.0**-126)


@triton.jit
def _absmax(x, axis: tl.constexpr):
    """max |x|, NaN if there is one: the bits of non-negative floats are in order as integers, NaN above infinity."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis).to(tl.float32, bitcast=True)


@triton.jit
def _scale(absmax, LIMIT: tl.constexpr):
    scale = tl.div_rn(absmax, tl.full(absmax.shape, LIMIT, tl.float32))
    return tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)  # a NaN stays


@triton.jit
def _inverse(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _codes(x, inverse, LIMIT: tl.constexpr, FLOAT: tl.constexpr):
    """Rounded codes as float32: whole numbers, or where FLOAT values of e4m3.

    e4m3 is rounded to here, and not by the cast that follows, so that the bits are one and the same on every GPU and
    under the interpreter, whose cast does not round to even. The clamp between product and sum keeps them from fusing
    to an FMA, which would round once instead of twice.
    """
    y = x * inverse
    y = tl.where(y == y, y, 0.0)
    y = tl.minimum(tl.maximum(y, -LIMIT), LIMIT)
    step = 1.0
    if FLOAT:  # 3 bits after the leading one, which counts for at least 2^-6
        power = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(power, 2.0**-6) * 0.125
    return (y + step * _ROUND) - step * _ROUND


@kernel()
def quantize_rows_kernel(x, q, scales, K, LIMIT: tl.constexpr, FLOAT: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    values = tl.load(x + row * K + k, k < K, 0.0).to(tl.float32)
    scale = _scale(_absmax(values, 0), LIMIT)
    codes = _codes(values, _inverse(scale), LIMIT, FLOAT)
    tl.store(q + row * K + k, codes.to(q.dtype.element_ty), k < K)
    tl.store(scales + row, scale)


@kernel()
def dequantize_rows_kernel(q, scales, out, K, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    codes = tl.load(q + row * K + k, k < K).to(tl.float32)
    tl.store(out + row * K + k, (codes * tl.load(scales + row)).to(out.dtype.element_ty), k < K)


@kernel()
def quantize_blocks_kernel(x, q, scales, N, K, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (n < N) & (k < K)
    at = (tl.program_id(2).to(tl.int64) * N + n) * K + k
    values = tl.load(x + at, inside, 0.0).to(tl.float32)
    scale = _scale(_absmax(tl.reshape(values, BLOCK * BLOCK), 0), LIMIT)
    codes = _codes(values, _inverse(scale), LIMIT, True)
    tl.store(q + at, codes.to(q.dtype.element_ty), inside)
    block = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(scales + block, scale)


@kernel()
def dequantize_blocks_kernel(q, scales, out, N, K, BLOCK: tl.constexpr):
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (n < N) & (k < K)
    at = (tl.program_id(2).to(tl.int64) * N + n) * K + k
    block = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    values = tl.load(q + at, inside).to(tl.float32) * tl.load(scales + block)
    tl.store(out + at, values.to(out.dtype.element_ty), inside)


@kernel()
def quantize_groups_kernel(x, q, scales, num_groups, LIMIT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    HALF: tl.constexpr = GROUP // 2
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    j = tl.arange(0, HALF)[None, :]
    inside = (group < num_groups)[:, None]
    at = x + group[:, None] * GROUP + j
    low = tl.load(at, inside, 0.0).to(tl.float32)
    high = tl.load(at + HALF, inside, 0.0).to(tl.float32)
    bits = tl.maximum(_absmax(low, 1).to(tl.int32, bitcast=True), _absmax(high, 1).to(tl.int32, bitcast=True))
    scale = _scale(bits.to(tl.float32, bitcast=True), LIMIT)
    inverse = _inverse(scale)[:, None]
    low_code = (_codes(low, inverse, LIMIT, False) + 8.0).to(tl.int32)
    high_code = (_codes(high, inverse, LIMIT, False) + 8.0).to(tl.int32)
    tl.store(q + group[:, None] * HALF + j, (low_code | (high_code << 4)).to(tl.uint8), inside)
    tl.store(scales + group, scale, group < num_groups)


@kernel()
def dequantize_groups_kernel(q, scales, out, num_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    HALF: tl.constexpr = GROUP // 2
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    j = tl.arange(0, HALF)[None, :]
    inside = (group < num_groups)[:, None]
    packed = tl.load(q + group[:, None] * HALF + j, inside).to(tl.int32)
    scale = tl.load(scales + group, group < num_groups)[:, None]
    low = ((packed & 15) - 8).to(tl.float32) * scale
    high = ((packed >> 4) - 8).to(tl.float32) * scale
    at = out + group[:, None] * GROUP + j
    tl.store(at, low.to(out.dtype.element_ty), inside)
    tl.store(at + HALF, high.to(out.dtype.element_ty), inside)


@operator("quantize_rows")
def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [.., K] of 16 or 32 bits -> codes of `dtype` (float8_e4m3fn or int8) [.., K], scales float32 [..].

    Both of activations, a scale a token, and of weights, a scale an output channel; x is read once. K <= 65,536.
    """
    x = x.contiguous()
    size = x.shape[-1]
    if size > _MAX_ROW:
        raise ValueError(f"quantize_rows takes rows of up to {_MAX_ROW} elements, these have {size}")
    q = torch.empty_like(x, dtype=dtype)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block = next_power_of_2(size)
    num_warps = 4 if block <= 2048 else 8 if block <= 8192 else 16
    quantize_rows_kernel[(scales.numel(),)](
        x, q, scales, size, LIMIT=LIMITS[dtype], FLOAT=dtype == FP8, BLOCK_K=block, num_warps=num_warps
    )
    return q, scales


@quantize_rows.register_fake
def _(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator("dequantize_rows")
def dequantize_rows(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q float8_e4m3fn or int8 [.., K], scales float32 [..] -> [.., K] of `dtype`, 16 or 32 bits."""
    q, scales = q.contiguous(), scales.contiguous()
    out = torch.empty_like(q, dtype=dtype)
    size = q.shape[-1]
    block = min(next_power_of_2(size), 4096)
    dequantize_rows_kernel[(scales.numel(), cdiv(size, block))](q, scales, out, size, BLOCK_K=block, num_warps=4)
    return out


@dequantize_rows.register_fake
def _(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


@operator("quantize_blocks")
def quantize_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [.., N, K] of 16 or 32 bits -> float8_e4m3fn [.., N, K], scales float32 [.., ceil(N / 128), ceil(K / 128)].

    As DeepSeek-V3's weights (arXiv:2412.19437, section 3.3.2); blocks at the edges are smaller.
    """
    w = w.contiguous()
    q = torch.empty_like(w, dtype=FP8)
    scales = torch.empty(_blocks(w), dtype=torch.float32, device=w.device)
    quantize_blocks_kernel[_block_grid(scales)](
        w, q, scales, *w.shape[-2:], LIMIT=LIMITS[FP8], BLOCK=BLOCK, num_warps=8
    )
    return q, scales


@quantize_blocks.register_fake
def _(w: Tensor) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape, dtype=FP8), w.new_empty(_blocks(w), dtype=torch.float32)


@operator("dequantize_blocks")
def dequantize_blocks(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q float8_e4m3fn [.., N, K], scales float32 [.., ceil(N / 128), ceil(K / 128)] -> [.., N, K] of `dtype`."""
    q, scales = q.contiguous(), scales.contiguous()
    out = torch.empty_like(q, dtype=dtype)
    dequantize_blocks_kernel[_block_grid(scales)](q, scales, out, *q.shape[-2:], BLOCK=BLOCK, num_warps=8)
    return out


@dequantize_blocks.register_fake
def _(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


@operator("quantize_groups")
def quantize_groups(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [.., N, K] of 16 or 32 bits, K a multiple of 128 -> int4 in uint8 [.., N, K / 2], scales float32 [.., N, K / 128].

    Round to nearest, without GPTQ's correction of the columns to the right (Frantar et al. 2022).
    """
    w = w.contiguous()
    if w.shape[-1] % GROUP:
        raise ValueError(f"int4 needs rows of a multiple of {GROUP} elements, these have {w.shape[-1]}")
    q = torch.empty(*w.shape[:-1], w.shape[-1] // 2, dtype=torch.uint8, device=w.device)
    scales = torch.empty(*w.shape[:-1], w.shape[-1] // GROUP, dtype=torch.float32, device=w.device)
    quantize_groups_kernel[(cdiv(scales.numel(), _GROUPS_PER_PROGRAM),)](
        w, q, scales, scales.numel(), LIMIT=INT4_LIMIT, GROUP=GROUP, GROUPS=_GROUPS_PER_PROGRAM, num_warps=4
    )
    return q, scales


@quantize_groups.register_fake
def _(w: Tensor) -> tuple[Tensor, Tensor]:
    q = w.new_empty((*w.shape[:-1], w.shape[-1] // 2), dtype=torch.uint8)
    return q, w.new_empty((*w.shape[:-1], w.shape[-1] // GROUP), dtype=torch.float32)


@operator("dequantize_groups")
def dequantize_groups(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q int4 in uint8 [.., N, K / 2], scales float32 [.., N, K / 128] -> [.., N, K] of `dtype`, 16 or 32 bits."""
    q, scales = q.contiguous(), scales.contiguous()
    out = torch.empty(*q.shape[:-1], 2 * q.shape[-1], dtype=dtype, device=q.device)
    dequantize_groups_kernel[(cdiv(scales.numel(), _GROUPS_PER_PROGRAM),)](
        q, scales, out, scales.numel(), GROUP=GROUP, GROUPS=_GROUPS_PER_PROGRAM, num_warps=4
    )
    return out


@dequantize_groups.register_fake
def _(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty((*q.shape[:-1], 2 * q.shape[-1]), dtype=dtype)


def _blocks(w: Tensor) -> list[int]:
    return [*w.shape[:-2], cdiv(w.shape[-2], BLOCK), cdiv(w.shape[-1], BLOCK)]


def _block_grid(scales: Tensor) -> tuple[int, int, int]:
    return scales.shape[-1], scales.shape[-2], scales[..., 0, 0].numel()
