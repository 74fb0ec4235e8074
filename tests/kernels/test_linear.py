from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, assert_bitwise_equal, assert_close, poison, poisoned_allocations
from ordered_products import ordered_products  # noqa: F401
from torch import Tensor

from batchmix.kernels import reference
from batchmix.kernels.gpu import current_gpu
from batchmix.kernels.linear import launch_linear, linear
from batchmix.kernels.tiles import format_of, heuristic


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 80), st.sampled_from([1, 31, 32, 64, 72]), st.sampled_from(DTYPES), st.booleans()
)
def test_linear(count: int, columns: int, depth: int, dtype: torch.dtype, batch_invariant: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, w = random(count, depth, dtype=dtype, device=device), random(columns, depth, dtype=dtype, device=device)
    with poisoned_allocations():
        out = linear(x, w, batch_invariant)
    assert_close(out, reference.linear(x, w))


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 15, 33, 130])
def test_all_tiles(count: int, dtype: torch.dtype, device: torch.device) -> None:
    x, w = random(count, 80, dtype=dtype, device=device), random(100, 80, dtype=dtype, device=device)
    expected = reference.linear(x, w)
    gpu = current_gpu(device)
    tiles = {heuristic("linear", format_of(dtype), rows, gpu) for rows in (1, 32, 64, 128, 1024)}
    for tile in tiles | {replace(tile, tma=False) for tile in tiles}:
        out = torch.empty(count, 100, dtype=dtype, device=device)
        poison(out)
        launch_linear(x, w, out, tile)
        assert_close(out, expected)


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype, device: torch.device) -> None:
    x, w = random(50, 96, dtype=dtype, device=device), random(70, 96, dtype=dtype, device=device)
    together = linear(x, w)
    assert_bitwise_equal(linear(x, w), together)
    for rows in (slice(0, 1), slice(49, 50), slice(3, 36)):
        assert_bitwise_equal(linear(x[rows], w), together[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tiles_of_every_size_give_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    x, w = random(4096, 4096, dtype=dtype, device=device), random(6144, 4096, dtype=dtype, device=device)
    together = linear(x, w, batch_invariant=False)
    for count in (1, 16, 33, 64, 65, 1000):
        assert_bitwise_equal(linear(x[:count], w, batch_invariant=False), together[:count])


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_no_tokens(batch_invariant: bool, device: torch.device) -> None:
    x, w = (torch.empty(rows, 32, dtype=torch.float16, device=device) for rows in (0, 5))
    assert linear(x, w, batch_invariant).shape == (0, 5)


def test_rows_that_lie_apart_are_refused(device: torch.device) -> None:
    """They would be read at the wrong places."""
    x, w = random(3, 64, dtype=torch.float32, device=device), random(5, 32, dtype=torch.float32, device=device)
    for left, right in ((x[:, :32], w), (w, x[:, :32])):
        with pytest.raises(AssertionError):
            linear(left, right)


def test_the_operator_is_registered_as_it_is(device: torch.device) -> None:
    x, w = random(3, 32, dtype=torch.float32, device=device), random(5, 32, dtype=torch.float32, device=device)
    torch.library.opcheck(linear.op, (x, w), test_utils=("test_schema", "test_faketensor"))
