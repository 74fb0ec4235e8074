"""Products of the interpreter whose bits can be compared: one order of summation for every element of the result.

The interpreter's tl.dot is numpy's matmul, and OpenBLAS gives the rows of one product different bits by where they
stand in it (with AVX-512, any shift of the rows of [128, 32] x [32, 64] changes some). Tensor cores give each row the
same sum. Tests that compare bits of a row in different places take this fixture; on a GPU it does nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def ordered_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, sums of tl.dot run over K from the accumulator on, a term at a time."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    fp8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()

    def values(factor: Any) -> Any:
        return fp8[factor.data] if factor.dtype.scalar.is_fp8e4nv() else factor.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        total = d.data.copy()
        left, right = (values(factor).astype(total.dtype) for factor in (a, b))
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[None, k]
        return TensorHandle(np.ascontiguousarray(total), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
