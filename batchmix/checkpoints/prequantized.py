"""Checkpoints that somebody has quantised: which format config.json names, and their tensors under the hub's names.

A weight is kept in parts, `<module>.qweight`, `<module>.scales` and so on. A `Packing` knows a format's parts and makes a
weight of them: `Quantized` where our kernels run exactly these codes and scales, else the values, which are then
rounded to the run dtype. Activations are always quantised as our kernels do it, never by a checkpoint's own scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from batchmix.checkpoints.bitsandbytes_format import bitsandbytes
from batchmix.checkpoints.compressed_tensors_format import compressed_tensors, fp8
from batchmix.checkpoints.gptq_awq import awq, gptq
from batchmix.checkpoints.layouts import FLOATS, Shape, hub_shapes
from batchmix.checkpoints.sources import TensorFiles
from batchmix.dtypes import Quantization
from batchmix.errors import BatchmixError
from batchmix.json_file import shown
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.models.quantized import Weight


class Packing(Protocol):
    """How a format keeps the weight [N, K] of a module."""

    @property
    def name(self) -> str:
        """As users call it."""

    @property
    def runs(self) -> Quantization | None:
        """The format of our kernels that these weights are in, without any loss."""

    @property
    def mark(self) -> str:
        """The part that shows that a module is quantised."""

    def parts(self, shape: Shape) -> Mapping[str, tuple[Shape, ...]]:
        """The shapes that each part of a weight of `shape` may have; none means any."""

    def unpack(self, parts: Mapping[str, Tensor], shape: Shape) -> Weight:
        """A `Quantized` of the format `runs`, or else the values. ValueError says what is wrong with the parts."""


_METHODS: dict[str, Callable[[Mapping[str, Any]], Packing]] = {
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "awq": awq,
    "gptq": gptq,
    "bitsandbytes": bitsandbytes,
}


def open_packing(raw: Mapping[str, Any], folder: Path) -> Packing | None:
    """What config.json's `quantization_config` describes; BatchmixError for a format that we cannot read."""
    config = raw.get("quantization_config") or raw.get("compression_config")
    if not config:
        return None
    try:
        method = config.get("quant_method")
        if not isinstance(method, str) or method not in _METHODS:
            raise ValueError(f"quant_method {shown(method)} is not one of {', '.join(_METHODS)}")
        return _METHODS[method](config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"is incomplete ({error!r})"
        raise BatchmixError(f"{folder / 'config.json'}: quantization_config: {reason}") from None


class PackedTensors:
    """A quantised checkpoint as the hub would name it: a `TensorSource`. Shapes are checked when it is opened."""

    def __init__(self, files: TensorFiles, packing: Packing, config: MixtralConfig, folder: Path) -> None:
        self._files, self._packing = files, packing
        self._shapes = hub_shapes(config)
        there = files.shapes()
        order = {name: place for place, name in enumerate(there)}
        self._stored: dict[str, tuple[str, ...]] = {}  # hub name -> the tensors that it is kept in
        for name, shape in self._shapes.items():
            prefix = name.removesuffix("weight")
            packed = prefix + packing.mark in there
            expected = {prefix + part: shapes for part, shapes in packing.parts(shape).items()} if packed else {}
            for stored, shapes in (expected or {name: (shape,)}).items():
                if stored not in there:
                    raise BatchmixError(f"{folder}: tensor {stored} is missing")
                if shapes and there[stored] not in shapes:
                    wanted = " or ".join(str(list(shape)) for shape in shapes)
                    raise BatchmixError(
                        f"{files.path(stored)}: tensor {stored} is {shown(list(there[stored]))}, not {wanted}"
                    )
            if not packed and files.dtype(name) not in FLOATS:
                raise BatchmixError(
                    f"{files.path(name)}: tensor {name} is of type {files.dtype(name)} and has no {packing.mark} beside it"
                )
            self._stored[name] = tuple(expected or (name,))
        self._order = sorted(self._stored, key=lambda name: order[self._stored[name][0]])

    def require(self, name: str) -> None:
        """BatchmixError where a weight is not quantised."""
        if self._stored[name] == (name,):
            raise BatchmixError(
                f"{self._files.path(name)}: tensor {name} is not quantised, though config.json's quantization_config"
                " says so; model.quantization quantises it as it is loaded"
            )

    def shapes(self) -> Mapping[str, Shape]:
        return {name: self._shapes[name] for name in self._order}

    def read(self, name: str) -> Weight:
        stored = self._stored[name]
        if stored == (name,):
            return self._files.read(name)
        skip = len(name.removesuffix("weight"))
        try:
            return self._packing.unpack({part[skip:]: self._files.read(part) for part in stored}, self._shapes[name])
        except ValueError as error:
            raise BatchmixError(f"{self._files.path(stored[0])}: {name[: skip - 1]}: {error}") from None

    def dtype(self, name: str) -> torch.dtype | None:
        """In which a tensor is stored; None for one that is quantised."""
        return None if self._stored[name] != (name,) else self._files.read(name).dtype

    def release(self, name: str) -> None:
        for stored in self._stored[name]:
            self._files.release(stored)
