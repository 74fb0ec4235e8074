"""Launches without Triton's search and torch's dispatch; `tests/engine/test_compile_ahead.py` makes them for an H200."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchmix.kernels.gemm import weight_descriptor
from batchmix.kernels.launch import Operator, _specialization, cdiv, kernel, next_power_of_2, operator


@kernel("count")
def _add_kernel(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < count) + 1.0, mask=at < count)


def _add_one(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _add_kernel[(cdiv(len(x), 16),)](x, out, len(x), BLOCK=16)
    return out


@pytest.fixture(scope="module")
def add_one() -> Operator[[Tensor], Tensor]:
    made = operator("test_add_one")(_add_one)
    made.register_fake(lambda x: torch.empty_like(x))
    return made


def test_an_operator_launches_and_is_torchs_too(add_one: Operator[[Tensor], Tensor], device: torch.device) -> None:
    x = torch.arange(20.0, device=device)
    assert torch.equal(add_one(x), x + 1)
    assert torch.equal(torch.ops.batchmix.test_add_one(x), x + 1)
    torch.library.opcheck(add_one.op, (x,))


def test_while_torch_compiles_it_is_an_operator(
    add_one: Operator[[Tensor], Tensor], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, seen = torch.arange(20.0, device=device), []
    monkeypatch.setattr(add_one, "op", lambda *arguments: seen.append(arguments))
    add_one(x)
    assert not seen
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    add_one(x)
    assert len(seen) == 1


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 20))
def test_division_and_powers_are_tritons(a: int, b: int) -> None:
    assert cdiv(a, b) == triton.cdiv(a, b)
    assert next_power_of_2(a) == max(1, triton.next_power_of_2(a))


def test_arguments_that_compile_to_other_kernels_are_told_apart() -> None:
    x = torch.zeros(64)
    same = [(x, x[4:]), (2, 3), (32, 48), (0.5, 2.0), (None, None), (1 << 40, 1 << 41)]
    other = [(x, x[1:]), (x, x.long()), (1, 2), (2, 16), (1, 1.0), (None, 0), (True, 1), (16, 1 << 40), (x, None)]
    for first, second in same:
        assert _specialization(first) == _specialization(second)
    for first, second in other:
        assert repr(_specialization(first)) != repr(_specialization(second)), (first, second)


def test_a_weights_descriptor_is_kept_as_long_as_the_weight() -> None:
    weight = torch.zeros(2, 32, 64)
    found = weight_descriptor(weight, [16, 32], torch.float32)
    assert list(found.shape) == [64, 64]
    assert weight_descriptor(weight, [16, 32], torch.float32) is found
    assert weight_descriptor(weight, [32, 32], torch.float32) is not found
    weight.data = torch.zeros(2, 32, 64)
    assert weight_descriptor(weight, [16, 32], torch.float32).base.data_ptr() == weight.data_ptr()
    assert weight_descriptor(torch.zeros(2, 32, 63), [16, 32], torch.float32) is None, "rows at no multiple of 16 bytes"
    gone = weakref.ref(weight)
    del weight
    gc.collect()
    assert gone() is None
