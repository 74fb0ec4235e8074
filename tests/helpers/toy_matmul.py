"""A small kernel for the tests of the ahead-of-time checks."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def matmul_kernel(x, w, out, K, stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0) * BM
    acc = tl.zeros((BM, BN), tl.float32)
    rows = row + tl.arange(0, BM)
    for k in range(0, K, BK):
        left = tl.load(x + rows[:, None] * K + k + tl.arange(0, BK)[None, :])
        acc = tl.dot(left, w.load([0, k]).T, acc)
    tl.store(out + rows[:, None] * stride + tl.arange(0, BN)[None, :], acc.to(out.dtype.element_ty))


@torch.library.custom_op("batchmix_test::matmul", mutates_args=())
def matmul(x: Tensor, w: Tensor, tile: int) -> Tensor:
    """x [M, K], w [128, K] -> x wᵀ [M, 128]."""
    out = torch.empty(len(x), len(w), dtype=x.dtype, device=x.device)
    weights: Any = TensorDescriptor.from_tensor(w, [128, 64])
    matmul_kernel[(len(x) // tile,)](x, weights, out, x.shape[1], out.stride(0), BM=tile, BN=128, BK=64, num_warps=4)
    return out
