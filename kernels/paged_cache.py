"""Attention over tiles of the paged KV cache: what prefill and decode share.

One layer's keys or values are [blocks, G, S, C]: a token at position p of a row lies in block table[row, p // S], at
p % S. Caches hold the dtype of the queries, or float8 e4m3 with a float32 scale for each kv head.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (a jitted function has no types that mypy could see; launchers are fully typed)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchmix.kernels.gpu import Gpu

FP8 = torch.float8_e4m3fn
LOG2_E = 1.4426950408889634


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """Cache elements as DTYPE; exact. uint8 is the bit pattern of e4m3, for GPUs whose Triton does not know it.

    e4m3's exponent and mantissa are the upper bits of float16's, whose exponent bias is larger by 8. (e4m3's two NaNs
    become 480, its largest finite value is 448.)
    """
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half * 256.0).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def cache_rows(table_ptr, low, end, kv_head, G: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr):
    """Positions low..low+TILE-1 of a row as rows of the cache seen as [blocks * G * S, C]: int64 [TILE].

    `low` is a multiple of TILE. Positions from `end` on give block 0, so the table is never read past the row's end.
    """
    if S % TILE == 0:  # the tile lies in one block: one read of the table, not TILE
        block = tl.load(table_ptr + low // S).to(tl.int64)
        return (block * G + kv_head) * S + low % S + tl.arange(0, TILE)
    else:
        position = low + tl.arange(0, TILE)
        block = tl.load(table_ptr + position // S, mask=position < end, other=0).to(tl.int64)
        return (block * G + kv_head) * S + position % S


@triton.jit
def load_tile(cache_ptr, rows, visible, C: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values [TILE, C] of cache rows [TILE]; zeros where not visible, whatever was left in memory there."""
    pointers = cache_ptr + rows[:, None] * C + tl.arange(0, C)[None, :]
    if MASKED:
        return tl.load(pointers, mask=visible[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def attend_tile(
    acc, peak, total, q, query_position, table_ptr, keys_ptr, values_ptr, low, end, kv_head, scale,
    G: tl.constexpr, S: tl.constexpr, C: tl.constexpr, KEY_TILE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one tile of a row's keys and values into acc [M, C], peak [M] (of scores in base 2) and total [M].

    Online softmax after Milakov and Gimelshein 2018. A query sees positions up to its own; a tile that all queries see
    whole needs no mask. Every query sees position `low` or an earlier tile, so no peak stays -inf. scale > 0.

    A tile has the same bits with MASKED and without: what is fused to a multiply-add is written so, and launchers turn
    the compiler's own fusion off, which a mask between product and difference would prevent in one of the two alone.
    """
    position = low + tl.arange(0, KEY_TILE)
    rows = cache_rows(table_ptr, low, end, kv_head, G, S, KEY_TILE)
    k = widen(load_tile(keys_ptr, rows, position < end, C, MASKED), q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(position[None, :] <= query_position[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    p = tl.exp2(tl.fma(scores, scale, -new_peak[:, None]))
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(p, 1)
    v = widen(load_tile(values_ptr, rows, position < end, C, MASKED), q.dtype)
    acc = tl.dot(p.to(q.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def head_scale(scale_ptr, scale_stride, kv_head):
    """The scale of a kv head's stored elements; 1 for caches without scales."""
    if scale_ptr is None:
        return 1.0
    else:
        return tl.load(scale_ptr + kv_head * scale_stride)


def readable(cache: Tensor, gpu: Gpu) -> Tensor:
    """The cache as the kernels take it on this GPU: e4m3 as bit patterns where its Triton backend has no such type.

    gfx942 has e4m3fnuz, another format, and would emulate e4m3fn with more instructions than `widen` takes.
    """
    native = gpu.arch == "cpu" or (gpu.arch.startswith("sm_") and int(gpu.arch.removeprefix("sm_")) >= 89)
    return cache if cache.dtype != FP8 or native else cache.view(torch.uint8)


def product_dtype(query: torch.dtype, cache: torch.dtype) -> tl.dtype:
    """The dtype that the products run in: float16 over an e4m3 cache (for queries of 16 bits), else the queries'.

    One instruction turns two e4m3 numbers into float16; bfloat16 takes another three. Queries have to be within
    float16's range, +-65504, then.
    """
    if cache == FP8 and query != torch.float32:
        return tl.float16
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[query]


def float32_precision(gpu: Gpu) -> str:
    """How products of float32 run: three TF32 products keep float32's precision on NVIDIA's tensor cores."""
    return "tf32x3" if gpu.arch.startswith("sm_") else "ieee"


def num_stages(gpu: Gpu) -> int:
    """Stages of a loop over key tiles: 5 load two tiles ahead, as reading the table takes as many as reading the keys.

    (Triton shares the stages among loads that wait for each other.) 3, one tile ahead, in the 99 KB of consumer GPUs;
    none in AMD's 64 KB, which hold the tiles once.
    """
    kilobytes = gpu.shared_memory // 1024
    return 5 if kilobytes > 100 else 3 if kilobytes > 64 else 1


def check_cache(q: Tensor, keys: Tensor, values: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """What every launcher that reads the cache relies on."""
    kv_heads, dim = keys.shape[1], keys.shape[3]
    assert q.shape[2] == dim, (q.shape, keys.shape)
    assert q.shape[1] % kv_heads == 0, (q.shape, keys.shape)
    assert q.stride()[1:] == (dim, 1), q.stride()  # tokens may lie apart: q as a slice of qkv is taken as it is
    assert dim in (32, 64, 128), dim
    assert keys.shape == values.shape, (keys.shape, values.shape)
    assert keys.is_contiguous(), keys.stride()
    assert values.is_contiguous(), values.stride()
    assert keys.dtype == values.dtype, (keys.dtype, values.dtype)
    assert keys.dtype in (q.dtype, FP8), (q.dtype, keys.dtype)
    if keys.dtype == FP8:
        assert k_scale is not None
        assert v_scale is not None
        assert k_scale.dtype == v_scale.dtype == torch.float32, (k_scale.dtype, v_scale.dtype)
        assert k_scale.shape == v_scale.shape, (k_scale.shape, v_scale.shape)
        assert k_scale.shape in ((1,), (kv_heads,)), k_scale.shape
    else:
        assert k_scale is None, "only an e4m3 cache has scales"
        assert v_scale is None, "only an e4m3 cache has scales"


def scale_stride(scale: Tensor | None) -> int:
    """From one kv head's scale to the next: 0 where one scale is for all."""
    return 0 if scale is None or len(scale) == 1 else 1
