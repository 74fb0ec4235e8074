"""Quantised experts for `batchmix convert`: the entries to be written, and a report of what quantising them cost."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from batchmix.checkpoints.compressed_tensors_format import pack
from batchmix.checkpoints.layouts import HubNames, Shape
from batchmix.checkpoints.prequantized import PackedTensors
from batchmix.checkpoints.safetensors_writer import Entry
from batchmix.dtypes import Quantization
from batchmix.models.quantized import Quantized, empty, quantize

REPORT = "quantization_report.json"
_MATRIX = re.compile(r"layers\.(\d+)\..*\.(w\d)\.weight$")


class QuantizedExperts:
    """Reads each expert's weight once, quantises it, and gives its parts."""

    def __init__(self, source: HubNames | PackedTensors, format: Quantization, dtype: torch.dtype) -> None:
        self.format = format
        self._source, self._dtype = source, dtype
        self._last: tuple[str, dict[str, Tensor]] = "", {}
        self._squares: dict[tuple[int, str], list[float]] = defaultdict(lambda: [0.0, 0.0])  # of errors, of weights

    def entries(self, name: str, shape: Shape) -> list[Entry]:
        """Of the weight with this name on the hub."""
        parts = pack(empty(shape, self.format, torch.device("meta")))
        prefix = name.removesuffix("weight")
        return [
            Entry(prefix + part, tuple(like.shape), like.dtype, self._piece(name, part)) for part, like in parts.items()
        ]

    def _piece(self, name: str, part: str) -> Callable[[], Iterable[Tensor]]:
        return lambda: [self._parts(name)[part]]

    def _parts(self, name: str) -> dict[str, Tensor]:
        """The parts of the weight that was asked for last are kept: they are written one after the other."""
        if self._last[0] != name:
            weight = self._source.read(name)
            if not isinstance(weight, Quantized) or weight.format is not self.format:
                values = weight.dequantize(self._dtype) if isinstance(weight, Quantized) else weight.to(self._dtype)
                weight = quantize(values, self.format)
                self._count(name, values.float(), weight)
            self._last = name, pack(weight)
            self._source.release(name)
        return self._last[1]

    def _count(self, name: str, values: Tensor, quantized: Quantized) -> None:
        found = _MATRIX.search(name)
        assert found is not None, name
        squares = self._squares[int(found[1]), found[2]]
        squares[0] += float((quantized.dequantize(torch.float32) - values).square().sum(dtype=torch.float64))
        squares[1] += float(values.square().sum(dtype=torch.float64))

    def errors(self) -> dict[int, dict[str, float]]:
        """||Wq - W|| / ||W|| in Frobenius' norm of all experts of a layer together, by layer and matrix."""
        table: dict[int, dict[str, float]] = defaultdict(dict)
        for (layer, matrix), (error, total) in sorted(self._squares.items()):
            table[layer][matrix] = (error / total) ** 0.5 if total else 0.0
        return dict(table)

    def report(self, folder: Path) -> str:
        """Write the errors into the folder, and tell them in a table."""
        table = self.errors()
        if not table:
            return f"the experts were in {self.format.value} already and are as they were"
        (folder / REPORT).write_text(json.dumps({
            "quantization": self.format.value,
            "relative_error": [{"layer": layer, **row} for layer, row in table.items()],
        }, indent=1) + "\n")  # fmt: skip
        lines = [
            f"experts in {self.format.value}, relative error ||Wq - W|| / ||W||",
            "layer       w1       w2       w3",
        ]
        lines += [
            f"{layer:5}" + "".join(f"{row[matrix]:9.5f}" for matrix in ("w1", "w2", "w3"))
            for layer, row in table.items()
        ]
        return "\n".join(lines)
