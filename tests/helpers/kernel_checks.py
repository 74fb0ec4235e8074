"""What the kernel tests share: dtypes that the device at hand can run, tolerances, and memory that is full of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from batchmix.kernels.row_state import RowTensors

ON_GPU = torch.cuda.is_available()

# The interpreter's tl.dot multiplies the raw bits of bfloat16 (upstream declined a fix): only a GPU tests it.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
HALF_DTYPES = DTYPES[1:]
FP8 = torch.float8_e4m3fn

# Of a kernel against its float32 oracle, relative to the largest value: a few roundings of the result and of what is
# rounded on the way to it. float32 is loose enough for sums in another order over a few thousand terms.
TOLERANCES = {
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
    FP8: 1.3e-1,
}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """`actual` is within `tolerance` (by default, of its dtype) of `expected`, relative to expected's largest value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    tolerance = TOLERANCES[actual.dtype] if tolerance is None else tolerance
    left, right = actual.double().cpu(), expected.double().cpu()
    assert left.isfinite().all() or not right.isfinite().all(), "values that are not finite: memory never written?"
    scale = max(right[right.isfinite()].abs().max().item() if right.isfinite().any() else 0.0, 1e-30)
    torch.testing.assert_close(left, right, rtol=0.0, atol=tolerance * scale, equal_nan=True)


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    """The same bits: unlike torch.equal it tells -0.0 from 0.0 and takes NaNs of one pattern for equal."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    left, right = (tensor.contiguous().view(torch.uint8) for tensor in (actual, expected))
    assert torch.equal(left, right), f"{int((left != right).sum())} of {left.numel()} bytes differ"


def poison(*tensors: Tensor) -> None:
    """Fill with NaN, or with the extreme value of an integer: what a kernel fails to write is then seen."""
    for tensor in tensors:
        if tensor.dtype == torch.bool:
            tensor.fill_(True)
        elif tensor.dtype.is_floating_point:
            tensor.fill_(float("nan"))
        else:
            tensor.fill_(torch.iinfo(tensor.dtype).max)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, torch.empty and its kin give poisoned memory, so also outputs and workspaces that a launcher allocates."""
    fill, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        probe = torch.empty(3)
        assert probe.isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def tensors_of(rows: RowTensors) -> dict[str, Tensor]:
    """By the name of the field, those that there are."""
    found = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def copied(rows: RowTensors, device: torch.device) -> RowTensors:
    return replace(rows, **{name: tensor.to(device, copy=True) for name, tensor in tensors_of(rows).items()})


def row_arguments(operator: Any, rows: RowTensors) -> dict[str, Tensor | None]:
    """What an operator takes of the rows, in its order."""
    names = [argument.name for argument in operator.op._opoverload._schema.arguments]
    return {name: getattr(rows, name) for name in names if hasattr(rows, name)}
