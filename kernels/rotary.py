"""Rotary embedding of queries and keys, and the write of keys and values into the paged cache, in one pass.

The packed projection is read once; queries come out rotated, keys and values go to the places in the cache that the
step's block and offset tensors name. Roundings are those of torch_ops.rotate: cos, sin, both products and their sum
each rounded to the dtype of the projection, so that the two backends agree bit by bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (a jitted function has no types that mypy could see; launchers are fully typed)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchmix.kernels.launch import cdiv, kernel, operator

_BLOCK_HEADS = 16  # heads that one program of 4 warps moves: 16 values a thread at head dim 128. Untuned
_E4M3_MAX = tl.constexpr(448.0)  # of torch.float8_e4m3fn, whose next value is NaN


@triton.jit
def _product(x, y, dtype: tl.constexpr):
    return (x * y).to(dtype).to(tl.float32)


@triton.jit
def _e4m3(x):
    """The bit pattern of the e4m3 number nearest to x, ties to even, beyond ±448 that of ±448; uint8.

    In integers, so that GPUs whose Triton has no e4m3 (sm_80; gfx942 has another format of this name) write the same.
    """
    size = tl.minimum(tl.abs(x), _E4M3_MAX)
    bits = size.to(tl.int32, bitcast=True)
    # float32 has 20 more mantissa bits and an exponent bias larger by 120; half of the last place kept, ties to even.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the code counts steps of 2^-9. 2^23 + n in float32 leaves n, rounded, in the mantissa.
    subnormal = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < 0.015625, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _cached(x, cache_ptr, scale_ptr, scale_stride, kv_head, mask):
    """x as the cache holds it; a cache of uint8 is one of e4m3."""
    if cache_ptr.dtype.element_ty != tl.uint8:
        return x.to(cache_ptr.dtype.element_ty)
    else:
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + kv_head * scale_stride, mask=mask, other=1.0)
            x = tl.div_rn(x, tl.zeros_like(x) + scale)
        return _e4m3(x)


@kernel()
def rotate_and_cache_kernel(
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, blocks_ptr, offsets_ptr, q_ptr, keys_ptr, values_ptr, k_scale_ptr,
    v_scale_ptr, scale_stride, qkv_stride, H, G, S, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]  # queries', then keys', then values'
    place = tl.arange(0, HALF)[None, :]
    is_query, is_key = head < H, (head >= H) & (head < H + G)
    is_value = (head >= H + G) & (head < H + 2 * G)
    source = qkv_ptr + token * qkv_stride + head * (2 * HALF) + place
    first = tl.load(source, mask=head < H + 2 * G, other=0.0)
    second = tl.load(source + HALF, mask=head < H + 2 * G, other=0.0)
    dtype: tl.constexpr = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)

    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_ptr + position * HALF + place).to(dtype).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + place).to(dtype).to(tl.float32)
    low = (_product(first, cos, dtype) - _product(second, sin, dtype)).to(dtype)
    high = (_product(second, cos, dtype) + _product(first, sin, dtype)).to(dtype)

    query = q_ptr + (token * H + head) * (2 * HALF) + place
    tl.store(query, low, mask=is_query)
    tl.store(query + HALF, high, mask=is_query)

    block, offset = tl.load(blocks_ptr + token).to(tl.int64), tl.load(offsets_ptr + token)
    kv_head = head - H
    key = keys_ptr + ((block * G + kv_head) * S + offset) * (2 * HALF) + place
    low, high = low.to(tl.float32), high.to(tl.float32)
    tl.store(key, _cached(low, keys_ptr, k_scale_ptr, scale_stride, kv_head, is_key), mask=is_key)
    tl.store(key + HALF, _cached(high, keys_ptr, k_scale_ptr, scale_stride, kv_head, is_key), mask=is_key)
    kv_head -= G
    value = values_ptr + ((block * G + kv_head) * S + offset) * (2 * HALF) + place
    tl.store(value, _cached(first, values_ptr, v_scale_ptr, scale_stride, kv_head, is_value), mask=is_value)
    tl.store(value + HALF, _cached(second, values_ptr, v_scale_ptr, scale_stride, kv_head, is_value), mask=is_value)


@operator("rotate_and_cache", mutates_args=("key_cache", "value_cache"))
def rotate_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Queries with rotary embedding (Su et al. 2021, half-split pairs); rotated keys and values into one layer's cache.

    qkv [T, (H + 2G) C] of any row stride, float32, float16 or bfloat16: H query heads, G key heads, G value heads;
    cos and sin float32 [positions, C/2]; positions, blocks and offsets int64 [T], a token's place in its row and in
    the cache. key_cache and value_cache [blocks, G, S, C], changed in place, of qkv's dtype, another of 16 or 32 bits,
    or float8_e4m3fn, then holding x / scale clipped to ±448, k_scale and v_scale float32 [G] or [1] (none: 1).
    -> [T, H, C].
    Tokens that name one place in the cache (padding, in the scratch block) leave any one of theirs there.
    """
    tokens, (_, kv_heads, block_size, dim) = len(qkv), key_cache.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    assert heads > 0, (qkv.shape, key_cache.shape)
    assert heads * dim + 2 * kv_heads * dim == qkv.shape[1], (qkv.shape, key_cache.shape)
    assert dim in (32, 64, 128), dim
    assert qkv.stride(1) == 1
    assert value_cache.shape == key_cache.shape
    assert cos.shape[1] == sin.shape[1] == dim // 2
    assert positions.shape == blocks.shape == offsets.shape == (tokens,)
    assert all(tensor.is_contiguous() for tensor in (key_cache, value_cache, cos, sin, positions, blocks, offsets))
    assert value_cache.dtype == key_cache.dtype
    assert (k_scale is None) == (v_scale is None)
    fp8 = key_cache.dtype == torch.float8_e4m3fn
    assert fp8 or k_scale is None, key_cache.dtype
    scale_stride = 0
    if k_scale is not None and v_scale is not None:
        assert k_scale.shape == v_scale.shape, (k_scale.shape, v_scale.shape)
        assert k_scale.shape in ((1,), (kv_heads,)), k_scale.shape
        scale_stride = int(len(k_scale) > 1)
    caches = [cache.view(torch.uint8) if fp8 else cache for cache in (key_cache, value_cache)]
    q = torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    if tokens:
        grid = tokens, cdiv(heads + 2 * kv_heads, _BLOCK_HEADS)
        # No fused multiply-add: in float32 it would skip the rounding of a product.
        rotate_and_cache_kernel[grid](
            qkv, cos, sin, positions, blocks, offsets, q, *caches, k_scale, v_scale, scale_stride,
            qkv.stride(0), heads, kv_heads, block_size, HALF=dim // 2, BLOCK_HEADS=_BLOCK_HEADS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return q


@rotate_and_cache.register_fake
def _(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    dim = key_cache.shape[3]
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // dim - 2 * key_cache.shape[1], dim)
