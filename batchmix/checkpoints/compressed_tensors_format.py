"""The layouts of compressed-tensors, which llm-compressor, vLLM and transformers share. Also ours for saving.

| kept as                        | parts                                                       | our kernels run it            |
|--------------------------------|-------------------------------------------------------------|-------------------------------|
| float-quantized, 8 bits        | weight e4m3 [N, K], weight_scale [1], [N, 1] or by block    | one scale a tensor or channel |
| int-quantized, 8 bits          | weight int8 [N, K], weight_scale [1] or [N, 1]              | likewise, if symmetric        |
| pack-quantized, 4 or 8 bits    | weight_packed int32 [N, K bits / 32], weight_scale [N, ..], | symmetric; int4 in groups of  |
|                                | weight_shape, weight_zero_point int32 [N bits / 32, ..]     | 128 or one scale a channel    |

Packed integers are unsigned, code + 2^(bits - 1), the first in the lowest bits. https://github.com/vllm-project/compressed-tensors

Legend: N output channels, K input channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchmix.checkpoints.layouts import Shape
from batchmix.dtypes import Quantization
from batchmix.models.quantized import FP8, GROUP, Quantized, Weight, int4_codes, pack_int4


@dataclass(frozen=True)
class CompressedTensors:
    """A `Packing`. `group`: columns that share a scale; 0: all of a channel, or of the tensor."""

    name: str
    runs: Quantization | None
    bits: int
    packed: bool
    symmetric: bool
    group: int
    block: tuple[int, int] | None
    scale: str = "weight_scale"

    @property
    def mark(self) -> str:
        return "weight_packed" if self.packed else self.scale

    def parts(self, shape: Shape) -> Mapping[str, tuple[Shape, ...]]:
        rows, width = shape
        scales = self._scale_shapes(shape)
        if not self.packed:
            zeros = {} if self.symmetric else {"weight_zero_point": scales}
            return {"weight": (shape,), self.scale: scales, **zeros}
        words = (rows, _ceil(width * self.bits, 32))
        zeros = {} if self.symmetric else {"weight_zero_point": ((_ceil(rows * self.bits, 32), scales[0][1]),)}
        return {"weight_packed": (words,), self.scale: scales, "weight_shape": ((2,),), **zeros}

    def _scale_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        rows, width = shape
        if self.block is not None:
            return ((_ceil(rows, self.block[0]), _ceil(width, self.block[1])),)
        if self.group:
            return ((rows, _ceil(width, self.group)),)
        return ((rows, 1), (1, 1), (1,), ())

    def unpack(self, parts: Mapping[str, Tensor], shape: Shape) -> Weight:
        rows, width = shape
        codes = unsigned(parts["weight_packed"], self.bits)[:, :width] if self.packed else parts["weight"]
        scales = parts[self.scale].float()
        scales = scales.view(-1, scales.shape[-1] if scales.ndim else 1)  # [1 or N, 1 or groups]
        if self.runs is Quantization.int4 and width % GROUP == 0:
            return Quantized(pack_int4(codes), scales.expand(rows, width // GROUP).contiguous(), self.runs)
        if self.runs in (Quantization.fp8, Quantization.int8):
            codes = (codes ^ 0x80).view(torch.int8) if self.packed else codes
            wanted = FP8 if self.runs is Quantization.fp8 else torch.int8
            if codes.dtype != wanted:
                raise ValueError(f"weight is of type {codes.dtype}, not {wanted}")
            return Quantized(codes, scales[:, 0].expand(rows).contiguous(), self.runs)
        if self.block is not None:
            spread = scales.repeat_interleave(self.block[0], 0)[:rows].repeat_interleave(self.block[1], 1)[:, :width]
            return codes.float() * spread
        if self.symmetric:
            return grouped_values(codes, (1 << self.bits) // 2 if self.packed else 0, scales, self.group or width)
        zeros = parts["weight_zero_point"]
        if self.packed:
            zeros = unsigned(zeros.T, self.bits)[:, :rows].T
        return grouped_values(codes, zeros, scales, self.group or width)


def compressed_tensors(config: Mapping[str, Any]) -> CompressedTensors:
    """Of a `quantization_config`; ValueError for what we cannot read."""
    if config.get("quantization_status", "compressed") != "compressed":
        raise ValueError(f"quantization_status is {config['quantization_status']!r}, not 'compressed'")
    for key in ("sparsity_config", "transform_config"):
        if any(value for value in (config.get(key) or {}).values() if value not in ("dense",)):
            raise ValueError(f"{key} is not supported")
    groups = [group for group in config["config_groups"].values() if group.get("weights")]
    kinds = {(_kind(group["weights"]), group.get("format") or config.get("format")) for group in groups}
    if len(kinds) != 1:
        raise ValueError("config_groups quantise weights in several ways, which is not supported")
    (((kind, bits, strategy, symmetric, group, block, actorder), form),) = kinds
    packed = form == "pack-quantized"
    if form not in ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized"):
        raise ValueError(
            f"format {form!r} is not one of pack-quantized, float-quantized, int-quantized, naive-quantized"
        )
    if actorder == "group":
        raise ValueError("actorder 'group' is not supported; save the model with actorder 'weight' or none")
    if bits != 8 and not (packed and bits == 4):
        raise ValueError(f"{form} weights of {bits} bits are not supported, only of 8, and packed ones of 4")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise ValueError(f"weights' strategy {strategy!r} is not supported")
    runs = None
    if symmetric and strategy in ("tensor", "channel"):
        runs = Quantization.fp8 if kind == "float" else Quantization.int8 if bits == 8 else Quantization.int4
    elif symmetric and strategy == "group" and (bits, group) == (4, GROUP):
        runs = Quantization.int4
    grain = f"groups of {group}" if strategy == "group" else f"one scale a {strategy}"
    name = f"compressed-tensors {kind}{bits}, {grain}{'' if symmetric else ', asymmetric'}"
    return CompressedTensors(name, runs, bits, packed, symmetric, group if strategy == "group" else 0, block)


def fp8(config: Mapping[str, Any]) -> CompressedTensors:
    """AutoFP8's checkpoints, one scale a tensor, and those in the manner of DeepSeek-V3, one a block."""
    block = config.get("weight_block_size")
    if block:
        return CompressedTensors("fp8, one scale a block", None, 8, False, True, 0, tuple(block), "weight_scale_inv")
    return CompressedTensors("fp8, one scale a tensor", Quantization.fp8, 8, False, True, 0, None)


def quantization_config(format: Quantization) -> dict[str, Any]:
    """What config.json says of a checkpoint whose experts `pack` has packed."""
    weights: dict[str, Any] = {
        Quantization.fp8: {"num_bits": 8, "type": "float", "strategy": "channel"},
        Quantization.int8: {"num_bits": 8, "type": "int", "strategy": "channel"},
        Quantization.int4: {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP},
    }[format]
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    form = "float-quantized" if format is Quantization.fp8 else "pack-quantized"
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**weights, "symmetric": True, "dynamic": False},
                "input_activations": activations if format is Quantization.fp8 else None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"],
        "kv_cache_scheme": None,
    }


def pack(weight: Quantized) -> dict[str, Tensor]:
    """The parts of an expert's weight [N, K], to be named `<module>.<part>`.

    fp8 as float-quantized, int8 and int4 as pack-quantized, which is how vLLM runs weights of integers with activations
    that are not quantised. Scales are float32, so that a saved weight is the same weight.
    """
    if weight.format is Quantization.fp8:
        return {"weight": weight.codes.contiguous(), "weight_scale": weight.scales[:, None].contiguous()}
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    if weight.format is Quantization.int8:
        width = weight.shape[1]
        padded = torch.nn.functional.pad(weight.codes.int() + 128, (0, -width % 4)).to(torch.uint8)
        return {"weight_packed": padded.view(torch.int32), "weight_scale": weight.scales[:, None].contiguous(),
                "weight_shape": shape}  # fmt: skip
    codes = int4_codes(weight.codes)
    return {"weight_packed": (codes[:, ::2] | (codes[:, 1::2] << 4)).view(torch.int32),
            "weight_scale": weight.scales.contiguous(), "weight_shape": shape}  # fmt: skip


def unsigned(words: Tensor, bits: int) -> Tensor:
    """int32 [.., W] of 4 or 8 bits a number, the first lowest -> uint8 [.., W * 32 / bits]."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def grouped_values(codes: Tensor, zeros: Tensor | int, scales: Tensor, group: int) -> Tensor:
    """(codes - zeros) * scales in float32: codes [N, K], the others [1 or N, groups of `group` along K]."""

    def spread(x: Tensor) -> Tensor:
        return x.float().repeat_interleave(group, 1)[:, : codes.shape[1]]

    return (codes.float() - (spread(zeros) if isinstance(zeros, Tensor) else zeros)) * spread(scales)


def _ceil(number: int, size: int) -> int:
    return -(-number // size)


def _kind(weights: Mapping[str, Any]) -> tuple[Any, ...]:
    block = weights.get("block_structure")
    group = weights.get("group_size") or 0
    strategy = weights.get("strategy") or ("group" if group > 0 else "channel" if group < 0 else "tensor")
    return (weights.get("type", "int"), weights.get("num_bits", 8), strategy, weights.get("symmetric", True), group,
            tuple(block) if block else None, weights.get("actorder"))  # fmt: skip
