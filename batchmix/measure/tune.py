"""`batchmix tune`: search the tiles of the grouped expert products on the GPU at hand, and write its tables.

For each product, weight format and number of rows: start from the tile that would be used now, change one field at a
time, keep what is faster and right, until nothing is or the time is up. The step of the sum over K is not searched: it
decides how sums are rounded, so it belongs to the format (kernels/tiles.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from batchmix.config import TuneConfig
from batchmix.errors import BatchmixError
from batchmix.kernels import tiles
from batchmix.kernels.gpu import current_gpu
from batchmix.kernels.moe import launch_experts
from batchmix.kernels.quantize import quantize_rows
from batchmix.kernels.routing import sort_pairs
from batchmix.kernels.tiles import Tile
from batchmix.measure.case import SHAPES, Shape, random, relative_error
from batchmix.measure.moe import FORMATS, restored, stored
from batchmix.measure.timing import seconds

ROWS = (4, 16, 32, 64, 128, 256, 1024, 4096)  # of an average expert
_CHOICES: dict[str, tuple[int | bool, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5, 6),
    "swap_ab": (False, True),
    "group_m": (1, 8, 16, 64),
    "programs_per_sm": (1, 2),
    "tma": (False, True),
    "permute": (False, True),
}
_TOLERANCE = {"fp8": 0.1, "fp8_block": 0.1}


def tune(config: TuneConfig) -> list[Path]:
    """Search within `config.seconds`, and write one table for each format; their paths."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise BatchmixError(
            "tune: there is no GPU (TRITON_INTERPRET=1 and tune.shape=tiny try the code path on the CPU)"
        )
    if config.shape not in SHAPES:
        raise BatchmixError(f"tune.shape={config.shape}: the shapes are {', '.join(SHAPES)}")
    unknown = sorted(set(config.formats) - set(FORMATS))
    if unknown:
        raise BatchmixError(f"tune.formats has {unknown[0]!r}; the formats are {', '.join(FORMATS)}")
    shape, gpu = SHAPES[config.shape], current_gpu(device)
    rows = config.rows or list(ROWS)
    searches = len(config.formats) * 2 * len(rows)
    deadline, paths = time.monotonic() + config.seconds, []
    for form in config.formats:
        path = tiles.table_path(gpu, form) if config.dir is None else Path(config.dir, tiles.table_path(gpu, form).name)
        for kind in ("up", "down"):
            product = _Product(kind, form, shape, device)
            for count in rows:
                budget = (deadline - time.monotonic()) / searches
                searches -= 1
                first = tiles.choose(kind, form, product.columns, product.depth, count, gpu)
                best, before, after, tried = _search(product, first, count, time.monotonic() + budget)
                _keep(path, tiles.table_key(kind, product.columns, product.depth), count, best)
                print(f"{form} {kind}, {count} rows an expert: {before * 1e3:.3f} -> {after * 1e3:.3f} ms"
                      f" ({tried} tiles tried): {best}", flush=True)  # fmt: skip
        paths.append(path)
    return paths


class _Product:
    """One grouped product of one weight format, on tokens that are spread over the experts evenly."""

    def __init__(self, kind: str, form: str, shape: Shape, device: torch.device) -> None:
        self.up, self.form, self.shape, self.device = kind == "up", form, shape, device
        self.columns = shape.intermediate if self.up else shape.hidden
        self.depth = shape.hidden if self.up else shape.intermediate
        self.dtype = getattr(torch, form) if form in ("float16", "float32") else torch.bfloat16
        if device.type == "cpu" and self.dtype is torch.bfloat16:
            self.dtype = torch.float32
        channels = 2 * self.columns if self.up else self.columns
        self.w, self.w_scale = stored(
            random(shape.experts, channels, self.depth, device=device, dtype=self.dtype, scale=self.depth**-0.5), form
        )

    def prepare(self, rows: int) -> None:
        """Inputs for `rows` rows an expert, and the oracle's answer for a few of them."""
        shape, device = self.shape, self.device
        pairs = rows * shape.experts
        top_k = shape.top_k if self.up else 1
        self.top_k = top_k
        x = random(pairs // top_k, self.depth, device=device, dtype=self.dtype, seed=1)
        experts = (torch.arange(pairs, device=device, dtype=torch.int32) % shape.experts).view(-1, top_k)
        self.order, self.offsets = sort_pairs(experts, shape.experts, None, None)
        self.weights = None if self.up else torch.ones(pairs, device=device)
        quantised = self.w.dtype == torch.float8_e4m3fn
        self.x: Tensor = x
        self.x_scale: Tensor | None = None
        if quantised:
            self.x, self.x_scale = quantize_rows(x, torch.float8_e4m3fn)
        self.out = torch.empty(pairs, self.columns, device=device, dtype=self.dtype)
        places = torch.linspace(0, pairs - 1, min(pairs, 16), device=device).long()
        full = restored(self.w, self.w_scale)
        answers = []
        for place in places.tolist():
            pair = int(self.order[place])
            row = x[pair // top_k if self.up else place].float()
            y = full[int(experts.flatten()[pair])] @ row
            answers.append(torch.nn.functional.silu(y[: self.columns]) * y[self.columns :] if self.up else y)
        self.places = places if self.up else self.order[places].long()
        self.expected = torch.stack(answers)

    def run(self, tile: Tile) -> None:
        launch_experts(self.x, self.x_scale, self.w, self.w_scale, self.order, self.offsets, self.weights, self.out,
                       self.top_k, tile)  # fmt: skip

    def time(self, tile: Tile) -> float:
        """Seconds; infinite where the tile does not fit the GPU, or gives a wrong answer."""
        self.out.fill_(float("nan"))
        try:
            self.run(tile)
        except (OutOfResources, triton.CompilationError, RuntimeError, AssertionError):
            return float("inf")
        if relative_error(self.out[self.places], self.expected) > _TOLERANCE.get(self.form, 3e-2):
            return float("inf")
        return seconds(lambda: self.run(tile), self.device, repeats=50)


def _search(product: _Product, first: Tile, rows: int, deadline: float) -> tuple[Tile, float, float, int]:
    """Best tile, the first one's seconds and the best one's, and how many were tried."""
    product.prepare(rows)
    before = product.time(first)
    best, fastest, seen = first, before, {first}
    improved = True
    while improved and time.monotonic() < deadline:
        improved = False
        for tile in _neighbours(best):
            if tile in seen or time.monotonic() > deadline:
                continue
            seen.add(tile)
            took = product.time(tile)
            if took < fastest:
                best, fastest, improved = tile, took, True
    return best, before, fastest, len(seen)


def _neighbours(tile: Tile) -> Iterator[Tile]:
    """Every tile that differs in one field."""
    for field, values in _CHOICES.items():
        for value in values:
            if value != getattr(tile, field):
                yield replace(tile, **{field: value})  # type: ignore[arg-type]


def _keep(path: Path, key: str, rows: int, tile: Tile) -> None:
    """Put one tile into the table, which may hold others."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(key, {})[str(rows)] = asdict(tile)
    table[key] = dict(sorted(table[key].items(), key=lambda item: int(item[0])))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
