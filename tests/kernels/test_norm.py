from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, assert_bitwise_equal, assert_close, poisoned_allocations
from torch import Tensor

from batchmix.kernels import reference
from batchmix.kernels.norm import add_rms_norm, rms_norm
from batchmix.models import torch_ops

EPS = 1e-5


def inputs(seed: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """x and residual [T, D], weight [D]."""
    source = torch.Generator().manual_seed(seed)
    shapes = (tokens, width), (tokens, width), (width,)
    return tuple((torch.randn(shape, generator=source) * 2).to(device, dtype) for shape in shapes)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 700), st.sampled_from(DTYPES))
def test_norms_equal_the_oracle(device, seed, tokens, width, dtype):
    x, residual, weight = inputs(seed, tokens, width, dtype, device)
    with poisoned_allocations():
        assert_close(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
        total = residual + x
        normed = add_rms_norm(x, residual, weight, EPS)
    assert_bitwise_equal(residual, total)
    assert_close(normed, reference.rms_norm(total, weight, EPS))
    assert_bitwise_equal(normed, rms_norm(total, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_roundings_are_those_of_the_torch_backend(device, dtype):
    x, _, weight = inputs(0, 3, 4096, dtype, device)
    ours, theirs = rms_norm(x, weight, EPS).float(), torch_ops.rms_norm(x, weight, EPS).float()
    # float32 sums in another order move a norm's last bit, which a half dtype's rounding hides nearly always.
    if dtype == torch.float32:
        assert_close(ours, theirs, 1e-6)
    else:
        assert ((ours != theirs).float().mean() < 0.002).item()
        assert_close(ours, theirs, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("width", [64, 100, 4096])
def test_a_token_does_not_depend_on_its_neighbours(device, width):
    x, residual, weight = inputs(1, 7, width, torch.float16, device)
    alone = residual[4:5].clone()
    one = rms_norm(x[4:5], weight, EPS), add_rms_norm(x[4:5], alone, weight, EPS), alone
    many = rms_norm(x, weight, EPS), add_rms_norm(x, residual, weight, EPS), residual
    for left, right in zip(one, many, strict=True):
        assert_bitwise_equal(left[0], right[4])


def test_rows_may_be_a_slice_of_wider_ones(device):
    x, residual, weight = inputs(2, 4, 96, torch.float32, device)
    wide = torch.full((4, 200), float("nan"), device=device)
    wide[:, 50:146] = x
    view = wide[:, 50:146]
    assert_bitwise_equal(rms_norm(view, weight, EPS), rms_norm(x, weight, EPS))
    other = residual.clone()
    assert_bitwise_equal(add_rms_norm(view, other, weight, EPS), add_rms_norm(x, residual, weight, EPS))
    assert_bitwise_equal(other, residual)


def test_no_tokens(device):
    x, residual, weight = (tensor.to(device) for tensor in (torch.ones(0, 8), torch.ones(0, 8), torch.ones(8)))
    assert rms_norm(x, weight, EPS).shape == add_rms_norm(x, residual, weight, EPS).shape == (0, 8)


def test_custom_ops_are_well_formed(device):
    x, residual, weight = inputs(3, 2, 40, torch.float32, device)
    torch.library.opcheck(rms_norm.op, (x, weight, EPS))
    torch.library.opcheck(add_rms_norm.op, (x, residual, weight, EPS))
