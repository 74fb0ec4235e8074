"""RMSNorm, alone and after the residual addition that comes before it.

A program normalises one token, whose D values it holds in registers, so a token's sum has the same order whatever the
other tokens are. Roundings are those of transformers' MixtralRMSNorm: the mean of squares and the scaling in float32,
one rounding to the dtype of x, and one of the product with the weight.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (a jitted function has no types that mypy could see; launchers are fully typed)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchmix.kernels.launch import kernel, next_power_of_2, operator


@triton.jit
def _normalise(x, weight_ptr, columns, inside, D, eps):
    """x [BLOCK_D] -> its norm in x's dtype times the weight, rounded again."""
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32) / D + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    return (x32 * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)


@kernel()
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, D, eps, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    out = _normalise(x, weight_ptr, columns, inside, D, eps)
    tl.store(out_ptr + row * D + columns, out.to(x.dtype), mask=inside)


@kernel()
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, x_stride, D, eps, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + row * D + columns, mask=inside, other=0.0)
    total = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
    tl.store(residual_ptr + row * D + columns, total, mask=inside)
    out = _normalise(total, weight_ptr, columns, inside, D, eps)
    tl.store(out_ptr + row * D + columns, out.to(x.dtype), mask=inside)


def _tile(width: int) -> tuple[int, int]:
    """(BLOCK_D, num_warps): 16 values a thread, at least one warp and at most 16. Untuned."""
    block = next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


def _check(x: Tensor, weight: Tensor) -> None:
    assert x.stride(1) == 1, x.stride()
    assert weight.dtype == x.dtype, (weight.dtype, x.dtype)
    assert weight.shape == (x.shape[1],), weight.shape
    assert weight.is_contiguous()


@operator("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight for each token (Zhang and Sennrich 2019).

    x [T, D] of any row stride, weight [D] of its dtype (float32, float16, bfloat16) -> [T, D], contiguous.
    """
    _check(x, weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        block, warps = _tile(x.shape[1])
        rms_norm_kernel[(len(x),)](x, weight, out, x.stride(0), x.shape[1], eps, BLOCK_D=block, num_warps=warps)
    return out


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@operator("add_rms_norm", mutates_args=("residual",))
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual += x`, rounded to its dtype, and the RMSNorm of the sum.

    x [T, D] of any row stride, residual [T, D] contiguous, changed in place, weight [D], all of one dtype (float32,
    float16, bfloat16) -> [T, D], contiguous.
    """
    _check(x, weight)
    assert residual.shape == x.shape, (residual.shape, x.shape)
    assert residual.dtype == x.dtype, (residual.dtype, x.dtype)
    assert residual.is_contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        block, warps = _tile(x.shape[1])
        add_rms_norm_kernel[(len(x),)](
            x, residual, weight, out, x.stride(0), x.shape[1], eps, BLOCK_D=block, num_warps=warps
        )
    return out


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)
