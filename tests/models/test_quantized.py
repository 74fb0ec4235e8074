"""Weights as codes and scales: the kernels' formats bit by bit, and slices of them."""

from __future__ import annotations

import pytest
import torch

from batchmix.dtypes import Quantization
from batchmix.kernels import reference
from batchmix.models.quantized import empty, quantize, tensors_of

FORMATS = list(Quantization)


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, one of them zero."""
    source = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=source) * torch.logspace(-6, 3, shape[-2])[:, None]
    w[..., 1, :] = 0
    return w


@pytest.mark.parametrize("format", [Quantization.fp8, Quantization.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_quantised_as_the_kernels_do(format, dtype):
    w = weight(9, 77).to(dtype)
    found = quantize(w, format)
    codes, scales = reference.quantize_rows(w, found.codes.dtype)
    assert torch.equal(found.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.dequantize(dtype), reference.dequantize_rows(codes, scales, dtype))


def test_int4_has_the_kernels_order_of_nibbles():
    w = weight(5, 256)
    found = quantize(w, Quantization.int4)
    assert torch.equal(found.dequantize(torch.float32), reference.dequantize_groups(found.codes, found.scales, w.dtype))


def test_the_clip_search_of_int4_is_no_worse_than_the_largest_weight_and_better_on_outliers():
    w = weight(40, 512, seed=1)
    w[:, ::97] *= 2
    by_largest, scales = reference.quantize_groups(w)
    plain = (reference.dequantize_groups(by_largest, scales, w.dtype) - w).norm(dim=1)
    found = (quantize(w, Quantization.int4).dequantize(w.dtype) - w).norm(dim=1)
    assert (found <= plain * 1.01).all()  # the scales are rounded to bfloat16
    assert found.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize("format", FORMATS)
def test_the_error_is_that_of_the_format(format):
    """Normal weights: half a step of 2^-3 of a value, of 1/127 and 1/7 of a row's or group's largest, uniform in it."""
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(2))
    error = (quantize(w, format).dequantize(w.dtype) - w).norm() / w.norm()
    low, high = {"fp8": (0.02, 0.03), "int8": (0.006, 0.01), "int4": (0.08, 0.12)}[format.value]
    assert low < error < high


@pytest.mark.parametrize("format", FORMATS)
def test_slices_of_a_quantised_weight_are_quantised_slices(format):
    stack = quantize(weight(3, 12, 512), format)
    whole = stack.dequantize(torch.float32)
    assert stack.shape == whole.shape
    assert torch.equal(stack[1].dequantize(torch.float32), whole[1])
    assert torch.equal(stack[2][3:7].dequantize(torch.float32), whole[2, 3:7])
    assert torch.equal(stack.narrow(1, 4, 6).dequantize(torch.float32), whole[:, 4:10])
    assert torch.equal(stack.narrow(-1, 128, 256).dequantize(torch.float32), whole[..., 128:384])
    for part, expected in zip(stack.chunk(2, -2), whole.chunk(2, -2), strict=True):
        assert torch.equal(part.dequantize(torch.float32), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_a_place_takes_codes_and_scales_and_counts_them(format):
    source = quantize(weight(4, 6, 128), format)
    place = empty(source.shape, format, torch.device("cpu"))
    place[2].copy_(source[1])
    assert torch.equal(place[2].dequantize(torch.float32), source[1].dequantize(torch.float32))
    assert place.nbytes == sum(tensor.nbytes for tensor in tensors_of(place)) == source.nbytes
    rows = 4 * 6
    assert place.nbytes == rows * {"fp8": 128 + 4, "int8": 128 + 4, "int4": 64 + 4}[format.value]
