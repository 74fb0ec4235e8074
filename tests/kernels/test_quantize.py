from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, FP8, assert_bitwise_equal, poisoned_allocations
from torch import Tensor

from batchmix.kernels import quantize, reference

INPUTS = [torch.float32, torch.float16, torch.bfloat16]  # the interpreter reads bfloat16, but does not round to it
CODES = [FP8, torch.int8]
GROUP = 128

Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]
Dequantize = Callable[[Tensor, Tensor, torch.dtype], Tensor]


def rows(dtype: torch.dtype) -> tuple[Quantize, Quantize, Dequantize, Dequantize]:
    return (
        lambda x: quantize.quantize_rows(x, dtype),
        lambda x: reference.quantize_rows(x, dtype),
        quantize.dequantize_rows,
        reference.dequantize_rows,
    )


# Of each format: the kernel and its oracle, then back again.
FORMATS: dict[str, tuple[Quantize, Quantize, Dequantize, Dequantize]] = {
    "fp8-rows": rows(FP8),
    "int8-rows": rows(torch.int8),
    "fp8-blocks": (
        quantize.quantize_blocks,
        reference.quantize_blocks,
        quantize.dequantize_blocks,
        reference.dequantize_blocks,
    ),
    "int4-groups": (
        quantize.quantize_groups,
        reference.quantize_groups,
        quantize.dequantize_groups,
        reference.dequantize_groups,
    ),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Rows whose sizes differ a thousandfold."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source) * torch.logspace(-2, 1, shape[-2])[:, None]


def check(name: str, x: Tensor, device: torch.device, out_dtype: torch.dtype) -> None:
    """The kernels of a format give their oracles' very bits, and write all of them."""
    forth, forth_oracle, back, back_oracle = FORMATS[name]
    q, scales = forth_oracle(x)
    values = back_oracle(q, scales, out_dtype)
    with poisoned_allocations():
        q_kernel, scales_kernel = forth(x.to(device))
        values_kernel = back(q_kernel, scales_kernel, out_dtype)
    assert_bitwise_equal(scales_kernel.cpu(), scales)
    assert_bitwise_equal(q_kernel.cpu(), q)
    assert_bitwise_equal(values_kernel.cpu(), values)


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("shape", [(1, 128), (3, 256), (129, 384), (130, 128)])
@pytest.mark.parametrize("name", FORMATS)
def test_bits_of_the_oracle(name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    check(name, random(*shape).to(dtype), device, dtype if dtype in DTYPES else torch.float32)


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (5, 130), (1, 4097), (257, 3)])
@pytest.mark.parametrize("name", ["fp8-rows", "int8-rows", "fp8-blocks"])
def test_awkward_shapes(name: str, shape: tuple[int, int], device: torch.device) -> None:
    check(name, random(*shape), device, torch.float16)


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    num_rows=st.integers(1, 40),
    size=st.integers(1, 300),
    dtype=st.sampled_from(INPUTS),
    out_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    name: str, num_rows: int, size: int, dtype: torch.dtype, out_dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    if name == "int4-groups":
        size = -(-size // GROUP) * GROUP
    check(name, random(num_rows, size, seed=seed).to(dtype), device, out_dtype)


def test_every_float16_rounds_to_fp8_as_in_torch(device: torch.device) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    x = every[every.abs() <= 448]  # among them +-448, so the scale is 1
    q, scales = quantize.quantize_rows(x[None].to(device), FP8)
    assert scales.tolist() == [1.0]
    assert_bitwise_equal(q.cpu()[0], (x.to(FP8).float() + 0.0).to(FP8))  # + 0.0: no negative zeros


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_errors(name: str, dtype: torch.dtype, device: torch.device) -> None:
    forth, _, back, _ = FORMATS[name]
    x = random(140, 384).to(dtype)
    q, scales = forth(x.to(device))
    error = (back(q, scales, torch.float32).cpu() - x.float()).abs()
    scale = scales.cpu()
    if name == "fp8-blocks":
        scale = scale.repeat_interleave(128, 0)[:140].repeat_interleave(128, 1)
    elif name == "int4-groups":
        scale = scale.repeat_interleave(128, 1)
    else:
        scale = scale[:, None]
    # Half a step: of fp8, 2^-3 of the value's power of two or, below 2^-6, 2^-9; of an integer, 1.
    bound = scale / 2 if "int" in name else torch.maximum(x.float().abs() / 16, scale * 2**-10)
    assert (error <= bound * (1 + 1e-5)).all()


def test_int4_layout(device: torch.device) -> None:
    x = torch.zeros(1, 256)
    x[0, 0], x[0, 64], x[0, 1], x[0, 127], x[0, 128] = 7, -7, 3, 2.5, 1
    q, scales = quantize.quantize_groups(x.to(device))
    q = q.cpu()[0]
    assert q[0] == (7 + 8) | (-7 + 8) << 4
    assert q[1] == (3 + 8) | 8 << 4
    assert q[63] == 8 | (2 + 8) << 4  # 2.5 rounds to even
    assert q[64] == (7 + 8) | 8 << 4  # 1 / (1 / 7)
    assert (q[65:] == 8 | 8 << 4).all()
    assert scales.cpu()[0].tolist() == [1.0, torch.tensor(1 / 7).item()]


def test_int4_reads_the_code_that_it_never_writes(device: torch.device) -> None:
    q = torch.zeros(1, 64, dtype=torch.uint8, device=device)
    assert (quantize.dequantize_groups(q, torch.ones(1, 1, device=device), torch.float16) == -8).all()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_subnormals(name: str, device: torch.device) -> None:
    forth, _, back, _ = FORMATS[name]
    x = torch.zeros(130, 256)
    check(name, x, device, torch.float32)
    q, scales = forth(x.to(device))
    assert (scales > 0).all()
    assert (back(q, scales, torch.float32) == 0).all()
    x[129, 200] = 1e-44
    x[0] = 2.0**-130
    check(name, x, device, torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # infinity * 0, in numpy
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_spoils_its_own_part_and_no_other(name: str, bad: float, device: torch.device) -> None:
    forth, forth_oracle, back, _ = FORMATS[name]
    x = random(130, 256)
    x[129, 200] = bad
    q, scales = forth(x.to(device))
    expected, _ = forth_oracle(x)
    assert_bitwise_equal(q.cpu(), expected)
    values = back(q, scales, torch.float32).cpu()
    spoiled = {"fp8-blocks": (slice(128, 130), slice(128, 256)), "int4-groups": (slice(129, 130), slice(128, 256))}
    part = spoiled.get(name, (slice(129, 130), slice(None)))
    assert values[part].isnan().all()
    values[part] = 0
    assert values.isfinite().all()


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.parametrize("name", FORMATS)
def test_stacked_experts(name: str, device: torch.device) -> None:
    forth, _, back, _ = FORMATS[name]
    w = random(2, 130, 256).half().to(device)
    q, scales = forth(w)
    values = back(q, scales, torch.float16)
    for expert in range(2):
        q_alone, scales_alone = forth(w[expert])
        assert_bitwise_equal(q[expert], q_alone)
        assert_bitwise_equal(scales[expert], scales_alone)
        assert_bitwise_equal(values[expert], back(q_alone, scales_alone, torch.float16))


@pytest.mark.parametrize("dtype", CODES)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, device: torch.device) -> None:
    x = random(33, 200).half().to(device)
    q, scales = quantize.quantize_rows(x, dtype)
    again, _ = quantize.quantize_rows(x, dtype)
    assert_bitwise_equal(q, again)
    for row in (0, 17, 32):
        q_alone, scale_alone = quantize.quantize_rows(x[row : row + 1], dtype)
        assert_bitwise_equal(q[row : row + 1], q_alone)
        assert_bitwise_equal(scales[row : row + 1], scale_alone)


def test_strided_input(device: torch.device) -> None:
    x = random(64, 256).to(device)
    q, scales = quantize.quantize_rows(x.T, torch.int8)
    expected, expected_scales = quantize.quantize_rows(x.T.contiguous(), torch.int8)
    assert_bitwise_equal(q, expected)
    assert_bitwise_equal(scales, expected_scales)


def test_no_rows(device: torch.device) -> None:
    q, scales = quantize.quantize_rows(torch.empty(0, 64, device=device), FP8)
    assert q.shape == (0, 64)
    assert scales.shape == (0,)


def test_what_cannot_be_quantised() -> None:
    with pytest.raises(ValueError, match="multiple of 128 elements, these have 130"):
        quantize.quantize_groups(torch.zeros(2, 130))
    with pytest.raises(ValueError, match="up to 65536 elements, these have 65537"):
        quantize.quantize_rows(torch.zeros(1, 65537), torch.int8)


@pytest.mark.parametrize("name", FORMATS)
def test_shapes_are_known_without_running(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    forth, _, back, _ = FORMATS[name]
    w = random(2, 130, 256).to(device)
    q, scales = forth(w)
    values = back(q, scales, torch.float16)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # when a launcher is torch's operator
    q_meta, scales_meta = forth(w.to("meta"))
    values_meta = back(q_meta, scales_meta, torch.float16)
    for real, meta in ((q, q_meta), (scales, scales_meta), (values, values_meta)):
        assert (real.shape, real.stride(), real.dtype) == (meta.shape, meta.stride(), meta.dtype)
