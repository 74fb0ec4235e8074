"""The layouts of bitsandbytes: weights of 4 bits (NF4, FP4) and of 8 (LLM.int8).

4 bits: weight uint8 [N K / 2, 1], two numbers in a byte, the first in the upper half, row after row; each is a place in the
table weight.quant_map float32 [16]; a block of 64 or so along the rows has a factor, weight.absmax. With double
quantisation absmax is uint8, places in weight.nested_quant_map float32 [256] times weight.nested_absmax float32 by block,
plus an offset; it and the sizes of blocks are in JSON in weight.quant_state.bitsandbytes__nf4 (Dettmers et al. 2023,
"QLoRA", and bitsandbytes/functional.py).

8 bits: weight int8 [N, K] and SCB float32 [N], a row's largest value: value = code * SCB / 127 (Dettmers et al. 2022). The
library keeps columns of activations with outliers in 16 bits and quantises the others; we quantise none of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchmix.checkpoints.layouts import Shape
from batchmix.dtypes import Quantization
from batchmix.models.quantized import Quantized, Weight


@dataclass(frozen=True)
class FourBit:
    """A `Packing`."""

    name: str
    state: str
    nested: bool
    runs: Quantization | None = None
    mark: str = "weight.absmax"

    def parts(self, shape: Shape) -> Mapping[str, tuple[Shape, ...]]:
        nested = ("weight.nested_absmax", "weight.nested_quant_map") if self.nested else ()
        return dict.fromkeys(("weight", "weight.absmax", "weight.quant_map", *nested, self.state), ())

    def unpack(self, parts: Mapping[str, Tensor], shape: Shape) -> Weight:
        state = json.loads(bytes(parts[self.state].tolist()))
        octets = parts["weight"].contiguous().view(torch.uint8).flatten()
        count = math.prod(shape)
        if list(state["shape"]) != list(shape) or octets.numel() * 2 != count + count % 2:
            raise ValueError(f"holds a weight of {state['shape']} in {octets.numel()} bytes, not one of {list(shape)}")
        absmax = parts["weight.absmax"]
        if self.nested:
            table, size = parts["weight.nested_quant_map"], state["nested_blocksize"]
            factors = parts["weight.nested_absmax"].repeat_interleave(size)[: absmax.numel()]
            absmax = table[absmax.int()] * factors + state["nested_offset"]
        codes = torch.stack((octets >> 4, octets & 15), -1).flatten()[:count]
        values = parts["weight.quant_map"].float()[codes.int()]
        return (values * absmax.float().repeat_interleave(state["blocksize"])[:count]).view(shape)


@dataclass(frozen=True)
class EightBit:
    """A `Packing`."""

    name: str = "bitsandbytes int8"
    runs: Quantization | None = Quantization.int8
    mark: str = "SCB"

    def parts(self, shape: Shape) -> Mapping[str, tuple[Shape, ...]]:
        return {"weight": (shape,), "SCB": ((shape[0],),)}

    def unpack(self, parts: Mapping[str, Tensor], shape: Shape) -> Weight:
        if parts["weight"].dtype != torch.int8:
            raise ValueError(f"weight is of type {parts['weight'].dtype}, not torch.int8")
        return Quantized(parts["weight"], parts["SCB"].float() / 127.0, Quantization.int8)


def bitsandbytes(config: Mapping[str, Any]) -> FourBit | EightBit:
    """Of a `quantization_config`."""
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return EightBit()
    if not (config.get("load_in_4bit") or config.get("_load_in_4bit")):
        raise ValueError("says neither load_in_4bit nor load_in_8bit")
    kind = config["bnb_4bit_quant_type"]
    nested = bool(config.get("bnb_4bit_use_double_quant", False))
    return FourBit(f"bitsandbytes {kind.upper()}", f"weight.quant_state.bitsandbytes__{kind}", nested)
