"""What the matrix-product kernels share: loads of tiles, one step of the sum over K in each weight format, epilogues.

Tiles of weights are [BN, BK] and tiles of x [BM, BK]. An accumulator is x w^T, [BM, BN], or with SWAP_AB w x^T,
[BN, BM], which gives tensor cores their 64 rows when x has fewer. Formats (`w` is a view of [E*N, K]):

    dense       w of x's dtype
    fp8         e4m3 x and w; scales of x by row and of w by output channel [E*N], both in the epilogue
    fp8_block   e4m3 x and w; scale of w by 128 x 128 block [E, N/128, K/128], on each step's partial sum
    int8        w int8, widened to x's dtype, which holds it exactly; scale by output channel [E*N] in the epilogue
    int4        w uint8 [E*N, K/2]: in each group of 128 along K byte j holds element j in its low nibble and 64 + j in
                its high one, value (q - 8) * scale, scale [E*N, K/128] on each step's partial sum, so that the weights
                that are multiplied are exact in 16 bits
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_MOST_DESCRIPTORS = 64  # of one weight; an engine has one a tile, a search of tiles many
BLOCK_SCALE = tl.constexpr(128)  # rows and columns of an fp8 weight block, and weights of an int4 group


@triton.jit
def product(w, x, acc, SWAP_AB: tl.constexpr):
    """acc + x w^T; float32 in full precision."""
    if SWAP_AB:
        return tl.dot(w, x.T, acc, input_precision="ieee")
    else:
        return tl.dot(x, w.T, acc, input_precision="ieee")


@triton.jit
def zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP_AB: tl.constexpr):
    """An empty accumulator."""
    if SWAP_AB:
        return tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        return tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def broadcast_m(values, SWAP_AB: tl.constexpr):
    """[BM] as it broadcasts against an accumulator."""
    if SWAP_AB:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def broadcast_n(values, SWAP_AB: tl.constexpr):
    """[BN] as it broadcasts against an accumulator."""
    if SWAP_AB:
        return values[:, None]
    else:
        return values[None, :]


@triton.jit
def to_row_major(acc, SWAP_AB: tl.constexpr):
    """The accumulator as [BM, BN]."""
    if SWAP_AB:
        return acc.T
    else:
        return acc


@triton.jit
def load_tile(source, row, pointers, k, K: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """Columns k to k + WIDTH of rows of `source`, zero from K on.

    From a descriptor they start at `row`; else `pointers` [rows, WIDTH] point at column 0 and following.
    """
    if DESCRIPTOR:
        return source.load([row, k])
    elif K % WIDTH == 0:
        return tl.load(pointers + k)
    else:
        return tl.load(pointers + k, mask=(k + tl.arange(0, WIDTH) < K)[None, :], other=0.0)


@triton.jit
def step(w, x, x_high, scale, acc, FORMAT: tl.constexpr, SWAP_AB: tl.constexpr):
    """acc + x w^T over one step of K. `scale` [BN] for the formats with a scale in each step; x_high for int4 only."""
    if FORMAT == "int4":
        # Two partial sums, not one through both halves: chained products go wrong on sm_103 (triton #10821).
        words = spread(w)
        part = product(int4_pairs(words & 0xF000F, x.dtype), x, tl.zeros_like(acc), SWAP_AB)
        part += product(int4_pairs((words >> 4) & 0xF000F, x.dtype), x_high, tl.zeros_like(acc), SWAP_AB)
        return acc + part * broadcast_n(scale, SWAP_AB)
    elif FORMAT == "fp8_block":
        return acc + product(w, x, tl.zeros_like(acc), SWAP_AB) * broadcast_n(scale, SWAP_AB)
    elif FORMAT == "int8":
        return product(int8_pairs(spread(w), x.dtype), x, acc, SWAP_AB)
    else:
        return product(w, x, acc, SWAP_AB)


# Integers to 16-bit floats, two in a 32-bit word at a time and with no conversion instruction: those are slower than
# the weights arrive. An integer becomes the last bits of a power of two whose ulp is 1, which is then subtracted.


@triton.jit
def spread(w):
    """int16 of two bytes each -> uint32 with the first byte in its low half and the second in its high one."""
    words = w.to(tl.uint16, bitcast=True).to(tl.uint32)
    return (words | (words << 8)) & 0xFF00FF


@triton.jit
def halves(words, dtype: tl.constexpr):
    """The two 16-bit halves of uint32 [BN, W] as bits of dtype, side by side: [BN, 2W]."""
    both = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    return both.reshape(words.shape[0], 2 * words.shape[1]).to(dtype, bitcast=True)


@triton.jit
def int4_pairs(words, dtype: tl.constexpr):
    """q - 8 of both halves of `words`, q from 0 to 15."""
    if dtype == tl.bfloat16:
        return halves(words | 0x43004300, tl.bfloat16) - 136.0  # 128 + q
    else:
        return (halves(words | 0x64006400, tl.float16) - 1032.0).to(dtype)  # 1024 + q


@triton.jit
def int8_pairs(words, dtype: tl.constexpr):
    """Both halves of `words`, each an int8 in its low byte."""
    if dtype == tl.bfloat16:  # 128 + the low 7 bits, less 256 where the sign bit is set and 128 where it is not
        words |= 0x43004300
        return halves(words & 0xFF7FFF7F, tl.bfloat16) - halves(words & 0xFF80FF80, tl.bfloat16)
    else:
        return (halves(words ^ 0x64806480, tl.float16) - 1152.0).to(dtype)  # 1024 + (128 + q)


def descriptor(tensor: Tensor, block: list[int]) -> Any:
    """A tensor descriptor of a matrix, for its kernel's constexpr to say that it is one."""
    return TensorDescriptor.from_tensor(tensor, block)


def weight_descriptor(weight: Tensor, block: list[int], dtype: torch.dtype) -> Any:
    """A tensor descriptor of [.., K] weights as a matrix of `dtype`, None where TMA cannot read it.

    It is kept with the weight: the same ones are described in every launch.
    """
    kept = weight.__dict__.setdefault("_descriptors", {})
    key = weight.data_ptr(), dtype, *block
    if key not in kept:
        if len(kept) >= _MOST_DESCRIPTORS:
            kept.clear()
        matrix = weight.detach().view(-1, weight.shape[-1]).view(dtype)
        kept[key] = descriptor(matrix, block) if can_describe(matrix) else None
    return kept[key]


def can_describe(tensor: Tensor) -> bool:
    """Whether TMA can read the matrix: base and rows at multiples of 16 bytes."""
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.itemsize % 16 == 0
    return tensor.stride(1) == 1 and aligned
