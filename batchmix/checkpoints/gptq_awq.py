"""The layouts of GPTQ (AutoGPTQ, GPTQModel) and of AWQ (AutoAWQ, version gemm).

Both keep a weight [N, K] transposed, as unsigned integers of `bits`, with a scale and a zero for each `group_size` rows of
K: value = (code - zero) * scale.

GPTQ: qweight int32 [K bits / 32, N], a word holding numbers along K, the first lowest; qzeros int32 [groups, N bits / 32]
along N, less by one in each place in the `gptq` form and as they are in `gptq_v2`; scales [groups, N]; g_idx int32 [K], a row's group.
AWQ: qweight int32 [K, N / 8] and qzeros int32 [groups, N / 8], a word holding 8 numbers along N in the order 0, 2, 4, 6, 1,
3, 5, 7; scales [groups, N].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchmix.checkpoints.compressed_tensors_format import unsigned
from batchmix.checkpoints.layouts import Shape
from batchmix.dtypes import Quantization
from batchmix.models.quantized import GROUP, Quantized, Weight, pack_int4

_ONES = {4: 0x11111111, 8: 0x01010101}  # what GPTQModel takes from whole words of zeros, so that a 0 borrows
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word number 0, 1, ... is


@dataclass(frozen=True)
class Gptq:
    """A `Packing`."""

    name: str
    runs: Quantization | None
    bits: int
    group: int  # 0: all of a channel
    one_less: bool  # of zeros
    mark: str = "qweight"

    def parts(self, shape: Shape) -> Mapping[str, tuple[Shape, ...]]:
        rows, width = shape
        groups = -(-width // self.group) if self.group else 1
        return {"qweight": ((width * self.bits // 32, rows),), "qzeros": ((groups, rows * self.bits // 32),),
                "scales": ((groups, rows),), "g_idx": ((width,),)}  # fmt: skip

    def unpack(self, parts: Mapping[str, Tensor], shape: Shape) -> Weight:
        rows, width = shape
        codes = unsigned(parts["qweight"].T, self.bits)  # [N, K]
        words = parts["qzeros"] + _ONES[self.bits] if self.one_less else parts["qzeros"]
        zeros = unsigned(words, self.bits).T.int()  # [N, groups]
        scales, group_of = parts["scales"].T.float(), parts["g_idx"].long()  # [N, groups], [K]
        if self.runs is None or (self.runs is Quantization.int4 and width % GROUP):
            if group_of.min() < 0 or group_of.max() >= scales.shape[1]:
                raise ValueError(f"g_idx names groups {group_of.min()} to {group_of.max()} of {scales.shape[1]}")
            return (codes.float() - zeros[:, group_of]) * scales[:, group_of]
        if not torch.equal(group_of, torch.arange(width) // (self.group or width)):
            raise ValueError("g_idx is not in order, though config.json's desc_act is false")
        if (zeros != 1 << (self.bits - 1)).any():
            raise ValueError(f"has other zeros than {1 << (self.bits - 1)}, though config.json's sym is true")
        if self.runs is Quantization.int8:
            return Quantized((codes.int() - 128).to(torch.int8), scales[:, 0].contiguous(), self.runs)
        return Quantized(pack_int4(codes), scales.expand(rows, width // GROUP).contiguous(), self.runs)


@dataclass(frozen=True)
class Awq:
    """A `Packing`. Zeros are anything, so that our kernels cannot run it."""

    name: str
    group: int  # 0: all of a channel
    runs: Quantization | None = None
    mark: str = "qweight"

    def parts(self, shape: Shape) -> Mapping[str, tuple[Shape, ...]]:
        rows, width = shape
        groups = -(-width // self.group) if self.group else 1
        return {"qweight": ((width, rows // 8),), "qzeros": ((groups, rows // 8),), "scales": ((groups, rows),)}

    def unpack(self, parts: Mapping[str, Tensor], shape: Shape) -> Weight:
        codes, zeros = (_from_awq(parts[name]) for name in ("qweight", "qzeros"))  # [K, N], [groups, N]
        group = self.group or shape[1]
        offset, scales = (x.repeat_interleave(group, 0)[: shape[1]] for x in (zeros.float(), parts["scales"].float()))
        return ((codes.float() - offset) * scales).T


def gptq(config: Mapping[str, Any]) -> Gptq:
    """Of a `quantization_config`; ValueError for what we cannot read."""
    bits, size, symmetric, reordered = (
        config["bits"],
        config["group_size"],
        config["sym"],
        config.get("desc_act", False),
    )
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format {form!r} is not one of gptq, gptq_v2")
    if bits not in (4, 8):
        raise ValueError(f"GPTQ of {bits} bits is not supported, only of 4 and 8")
    group = max(0, size)
    runs = None
    if symmetric and not reordered and (group == 0 or (bits, group) == (4, GROUP)):
        runs = Quantization.int4 if bits == 4 else Quantization.int8
    details = (f"groups of {group}" if group else "one scale a channel") + ", act-order" * reordered
    return Gptq(f"GPTQ int{bits}, {details}{'' if symmetric else ', asymmetric'}", runs, bits, group, form == "gptq")


def awq(config: Mapping[str, Any]) -> Awq:
    """Of a `quantization_config`; ValueError for what we cannot read."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise ValueError(f"AWQ version {version!r} is not supported, only gemm")
    bits = config.get("bits") or config.get("w_bit")
    if bits != 4:
        raise ValueError(f"AWQ of {bits} bits is not supported, only of 4")
    group = max(0, config.get("group_size") or config.get("q_group_size") or 0)
    return Awq(f"AWQ int4, {f'groups of {group}' if group else 'one scale a channel'}", group)


def _from_awq(words: Tensor) -> Tensor:
    """int32 [.., N / 8] -> uint8 [.., N]."""
    return unsigned(words, 4).view(*words.shape, 8)[..., _AWQ_PLACES].flatten(-2)
