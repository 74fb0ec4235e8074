"""Weights as codes and scales: the formats that the kernels run, in plain torch, on any device.

| format | codes                                        | scales, float32            |
|--------|----------------------------------------------|----------------------------|
| fp8    | float8_e4m3fn [.., N, K]                     | [.., N]: an output channel |
| int8   | int8 [.., N, K]                              | [.., N]                    |
| int4   | uint8 [.., N, K / 2], two codes + 8 in a byte | [.., N, K / 128]: a group  |

A value is code * scale. Codes, scales and the order of nibbles are those of kernels/quantize.py, bit by bit, but for the
scales of int4, which are searched for (`_search_groups`). Rows lie along K, so a slice of output channels is a slice of
codes and scales; a slice of K of fp8 and int8 keeps the scales of the whole rows.

Legend: N output channels, K input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchmix.dtypes import Quantization
from batchmix.errors import BatchmixError
from batchmix.models.mixtral_config import MixtralConfig

GROUP = 128  # int4 weights along K that share a scale
FP8 = torch.float8_e4m3fn
_LIMITS = {Quantization.fp8: 448.0, Quantization.int8: 127.0}
_CODES = {Quantization.fp8: FP8, Quantization.int8: torch.int8, Quantization.int4: torch.uint8}
_ELEMENTS_AT_ONCE = 1 << 20
_SMALLEST_SCALE = 2.0**-126
_CLIP_RATIOS = tuple(1 - 0.05 * step for step in range(11))  # 1 to 0.5


@dataclass(frozen=True)
class Quantized:
    """A weight [.., N, K] as codes and scales."""

    codes: Tensor
    scales: Tensor
    format: Quantization

    @property
    def shape(self) -> torch.Size:
        """Of the weight, not of its codes."""
        *rows, width = self.codes.shape
        return torch.Size((*rows, width * 2 if self.format is Quantization.int4 else width))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int | slice) -> Quantized:
        """Along the first dimension, which must not be K: an expert of a stack, or channels."""
        return Quantized(self.codes[index], self.scales[index], self.format)

    def __iter__(self) -> Iterator[Quantized]:
        return (self[index] for index in range(len(self)))

    def narrow(self, dim: int, start: int, length: int) -> Quantized:
        """A view of `length` weights from `start` on, along any dimension; for int4 along K both multiples of 128."""
        dim %= self.codes.ndim
        codes, scales = self.codes, self.scales
        if dim < codes.ndim - 1:
            return Quantized(codes.narrow(dim, start, length), scales.narrow(dim, start, length), self.format)
        if self.format is not Quantization.int4:
            return Quantized(codes.narrow(dim, start, length), scales, self.format)
        assert start % GROUP == length % GROUP == 0, (start, length)
        return Quantized(
            codes.narrow(dim, start // 2, length // 2), scales.narrow(dim, start // GROUP, length // GROUP), self.format
        )

    def chunk(self, parts: int, dim: int) -> list[Quantized]:
        """`parts` views of one size along `dim`."""
        length = self.shape[dim] // parts
        return [self.narrow(dim, part * length, length) for part in range(parts)]

    def copy_(self, other: Quantized) -> None:
        """Take the other's codes and scales, which may be on another device."""
        assert other.format is self.format, (other.format, self.format)
        self.codes.copy_(other.codes)
        self.scales.copy_(other.scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """-> [.., N, K] of `dtype`, the products rounded once."""
        if self.format is Quantization.fp8:
            return fp8_values(self.codes).mul_(self.scales[..., None]).to(dtype)
        if self.format is Quantization.int8:
            return self.codes.float().mul_(self.scales[..., None]).to(dtype)
        codes = int4_codes(self.codes).view(*self.scales.shape, GROUP).float().sub_(8.0)
        return codes.mul_(self.scales[..., None]).flatten(-2).to(dtype)


Weight = Tensor | Quantized
Experts = Weight | tuple[Tensor, ...]  # stacked, or one by one: prepacked
Empty = Callable[[Sequence[int], torch.dtype], Tensor]  # allocates


def tensors_of(weight: Experts) -> list[Tensor]:
    """The tensors that hold a weight."""
    if isinstance(weight, tuple):
        return list(weight)
    return [weight.codes, weight.scales] if isinstance(weight, Quantized) else [weight]


def check_shape(quantization: Quantization | None, config: MixtralConfig, why: str = "") -> None:
    """BatchmixError where the experts of a model of this shape cannot be kept in the format. `why`: begins the message."""
    for name, size in (("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)):
        if quantization is Quantization.int4 and size % GROUP:
            raise BatchmixError(
                f"{why}int4 weights come in groups of {GROUP}, and the experts' {name} of {size} is no multiple of"
                " that; use model.quantization=int8 or fp8"
            )


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A quantised weight's values as `dtype`; another weight as it is."""
    return weight.dequantize(dtype) if isinstance(weight, Quantized) else weight


def format_of(weight: Experts) -> Quantization | None:
    """None where it is not quantised."""
    return weight.format if isinstance(weight, Quantized) else None


def empty(shape: Sequence[int], format: Quantization, device: torch.device) -> Quantized:
    """A weight of `shape` [.., N, K], not initialised."""
    return allocated(shape, format, lambda part, dtype: torch.empty(tuple(part), dtype=dtype, device=device))


def allocated(shape: Sequence[int], format: Quantization, allocate: Empty) -> Quantized:
    """A weight of `shape` [.., N, K] in memory that `allocate` gives."""
    *rows, width = shape
    int4 = format is Quantization.int4
    assert not (int4 and width % GROUP), shape
    codes = allocate((*rows, width // 2 if int4 else width), _CODES[format])
    scales = allocate((*rows, width // GROUP) if int4 else rows, torch.float32)
    return Quantized(codes, scales, format)


def quantize(weight: Tensor, format: Quantization) -> Quantized:
    """weight [.., N, K], for int4 K a multiple of 128 -> its codes and scales, computed on its device in float32.

    Some rows at a time, so that what the computation takes does not grow with the weight.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(1, _ELEMENTS_AT_ONCE // rows.shape[1])
    parts = [_quantize_part(rows[start : start + step], format) for start in range(0, len(rows), step)]
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    leading = weight.shape[:-1]
    return Quantized(codes.view(*leading, -1), scales.view(*leading, *scales.shape[1:]), format)


def _quantize_part(weight: Tensor, format: Quantization) -> tuple[Tensor, Tensor]:
    if format is not Quantization.int4:
        return quantize_rows(weight, format)
    groups = weight.float().reshape(*weight.shape[:-1], -1, GROUP)  # [.., N, K / 128, 128]
    scales = _search_groups(groups)
    return pack_int4(_int4_codes(groups, scales).add_(8.0).to(torch.uint8).flatten(-2)), scales


def pack_int4(codes: Tensor) -> Tensor:
    """Codes + 8, uint8 [.., K] -> two in a byte in the kernels' order, uint8 [.., K / 2]."""
    low, high = codes.view(*codes.shape[:-1], -1, GROUP).chunk(2, -1)
    return (low | (high << 4)).flatten(-2)


def int4_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`."""
    groups = packed.view(*packed.shape[:-1], -1, GROUP // 2)  # [.., K / 128, 64]
    return torch.cat((groups & 15, groups >> 4), -1).flatten(-2)


def quantize_rows(x: Tensor, format: Quantization) -> tuple[Tensor, Tensor]:
    """x [.., K] -> fp8 or int8 codes [.., K], scales float32 [..]: max |row| becomes the largest code.

    Bits as kernels.quantize.quantize_rows, but for rows with an infinity or NaN. A row's bits do not depend on others.
    """
    limit = _LIMITS[format]
    x32 = x.float()
    scales = x32.abs().amax(-1).div_(limit).clamp_(min=_SMALLEST_SCALE)
    codes = (x32 * scales.reciprocal()[..., None]).clamp_(-limit, limit)
    if format is Quantization.int8:
        codes = codes.round_()
        return codes.to(torch.int8), scales
    codes = codes.to(FP8)
    codes.view(torch.uint8).masked_fill_(codes.view(torch.uint8) == 0x80, 0)  # no negative zeros
    return codes, scales


def through_fp8(x: Tensor) -> Tensor:
    """x [.., K] rounded to fp8 codes and a scale for each row, and back."""
    return Quantized(*quantize_rows(x, Quantization.fp8), Quantization.fp8).dequantize(x.dtype)


def as_input(x: Tensor, weight: Experts) -> Tensor:
    """x [.., K] as products with the weight take it: rounded to fp8 where the weight is fp8."""
    return through_fp8(x) if format_of(weight) is Quantization.fp8 else x


def fp8_values(codes: Tensor) -> Tensor:
    """codes of float8_e4m3fn as float32. As codes.float(), which on a CPU takes three times as long; NaN becomes 480.

    The bits of e4m3 are those of a float16 with an exponent too small by 8, subnormal numbers too.
    """
    bits = codes.view(torch.int8).to(torch.int16)  # the sign is in the upper bits
    return (((bits << 7) & 0x3FFF) | (bits & -0x8000)).view(torch.float16).float().mul_(256.0)


def _search_groups(groups: Tensor) -> Tensor:
    """Scales [.., groups] of int4 groups [.., groups, 128], the best of `_CLIP_RATIOS` * max |group| / 7.

    The best is the one with the least sum of squared differences over the group. With no activations to look at, taken
    to be uncorrelated and of one size, that is also the least expected squared error of the layer's output (as OCTAV,
    Sakr et al. 2022, and the weight clipping of AWQ, Lin et al. 2023, without their samples). Codes go from -8 to 7.
    Scales are numbers of bfloat16, which is what checkpoints keep them in: a saved one loses nothing.
    """
    largest = groups.abs().amax(-1)
    best = torch.full_like(largest, torch.inf)
    scales = torch.ones_like(largest)
    for ratio in _CLIP_RATIOS:
        scale = (largest * (ratio / 7.0)).clamp_(min=_SMALLEST_SCALE).bfloat16().float()
        error = _int4_codes(groups, scale).mul_(scale[..., None]).sub_(groups).square_().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
    return scales


def _int4_codes(groups: Tensor, scales: Tensor) -> Tensor:
    """Codes -8 to 7 as float32."""
    return (groups * scales.reciprocal()[..., None]).round_().clamp_(-8.0, 7.0)
