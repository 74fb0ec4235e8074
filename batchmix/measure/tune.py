"""`batchmix tune`: search the tiles of the grouped expert products on the GPU at hand, and write its tables.

For each weight format: compile all candidates by as many processes as there are CPUs, then time them at each number of
rows. The fastest ones and the rule's tile are timed once more in one way, cleared cache and all; a tile goes into the
table only where it is right and clearly faster than the rule's, else the table says that the rule's was as good.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from batchmix.errors import BatchmixError
from batchmix.kernels import tiles
from batchmix.kernels.compile import recorded
from batchmix.kernels.gpu import Gpu, current_gpu
from batchmix.kernels.moe import launch_experts
from batchmix.kernels.quantize import quantize_rows
from batchmix.kernels.routing import sort_pairs
from batchmix.kernels.tiles import Tile
from batchmix.measure.candidates import candidates, compiled, suits
from batchmix.measure.case import SHAPES, Shape, random, relative_error
from batchmix.measure.config import TuneConfig
from batchmix.measure.moe import FORMATS, restored, stored
from batchmix.measure.timing import seconds

ROWS = (4, 16, 32, 64, 96, 128, 144, 192, 256, 384, 512, 1024, 2048, 4096)  # of an average expert
MARGIN = 0.03  # by which a tile has to beat the rule's: two runs of one tile differ by as much
_TOLERANCE = {"fp8": 0.1, "fp8_block": 0.1}
_COMPILING = 0.6  # of a format's time at most
_FINALISTS = 3  # beside the rule's


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
    if min(config.rows or ROWS) < 1:
        raise BatchmixError(f"tune.rows has {min(config.rows or ROWS)}; an expert has at least 1 row")
    gpu, deadline = current_gpu(device), time.monotonic() + config.seconds
    paths = []
    for place, form in enumerate(config.formats):
        path = tiles.table_path(gpu, form)
        path = path if config.dir is None else Path(config.dir, path.name)
        limit = (deadline - time.monotonic()) / (len(config.formats) - place)
        if _tune_format(form, SHAPES[config.shape], config.rows or list(ROWS), device, path, limit):
            paths.append(path)
    if not paths:
        raise BatchmixError(f"tune.seconds={config.seconds:g}: nothing could be searched in that time; give it more")
    return paths


def _tune_format(form: str, shape: Shape, rows: list[int], device: torch.device, path: Path, limit: float) -> bool:
    """Whether anything was searched, and so written."""
    gpu, deadline = current_gpu(device), time.monotonic() + limit
    kinds = ("up", "down")
    rules = {kind: [tiles.heuristic(kind, form, count, gpu) for count in rows] for kind in kinds}
    tried = {kind: list(dict.fromkeys(rules[kind] + candidates(kind, form, gpu))) for kind in kinds}
    if device.type == "cuda":
        launches = []
        for kind in kinds:
            launches.append((shapes_alone(kind, form, shape, max(rows), gpu).run, tried[kind]))
        print(f"{form}: ", end="")
        tried = dict(zip(kinds, compiled(launches, gpu, limit * _COMPILING), strict=True))
    searches, written = len(kinds) * len(rows), False
    for kind in kinds:
        product = _Product(kind, form, shape, device)
        found: dict[int, Tile | None] = {}
        for count, rule in zip(rows, rules[kind], strict=True):
            now = time.monotonic()
            if now > deadline:
                print(f"{form} {kind}, {count} rows an expert: not searched, the time is up", flush=True)
                continue
            product.take_rows(count)
            product.ask_oracle()
            some = [tile for tile in tried[kind] if tile != rule and suits(tile, count)]
            found[count] = _search(product, rule, some, now + (deadline - now) / searches, f"{count} rows an expert")
            searches -= 1
        if found:  # a product without numbers of rows would hide other GPUs' tables
            tiles.write_table(path, tiles.table_key(kind, product.columns, product.depth), found)
            written = True
    return written


class _Product:
    """One grouped product of one weight format, on tokens that are spread over the experts evenly."""

    def __init__(self, kind: str, form: str, shape: Shape, device: torch.device) -> None:
        self.kind, self.up, self.form, self.shape, self.device = kind, kind == "up", form, shape, device
        self.columns = shape.intermediate if self.up else shape.hidden
        self.depth = shape.hidden if self.up else shape.intermediate
        self.dtype = getattr(torch, form) if form in ("float16", "float32") else torch.bfloat16
        if device.type == "cpu" and self.dtype is torch.bfloat16:
            self.dtype = torch.float32
        channels = 2 * self.columns if self.up else self.columns
        self.w, self.w_scale = stored(
            random(shape.experts, channels, self.depth, device=device, dtype=self.dtype, scale=self.depth**-0.5), form
        )

    def take_rows(self, rows: int) -> None:
        """Inputs for `rows` rows an expert."""
        shape, device = self.shape, self.device
        pairs = rows * shape.experts
        self.top_k = shape.top_k if self.up else 1
        self.exact_x = random(pairs // self.top_k, self.depth, device=device, dtype=self.dtype, seed=1)
        experts = torch.arange(pairs, device=device, dtype=torch.int32) % shape.experts
        self.experts = experts.view(-1, self.top_k)
        self.order, self.offsets = sort_pairs(self.experts, shape.experts, None, None)
        self.weights = None if self.up else torch.ones(pairs, device=device)
        self.x: Tensor = self.exact_x
        self.x_scale: Tensor | None = None
        if self.w.dtype == torch.float8_e4m3fn:
            self.x, self.x_scale = quantize_rows(self.exact_x, torch.float8_e4m3fn)
        self.out = torch.empty(pairs, self.columns, device=device, dtype=self.dtype)

    def ask_oracle(self) -> None:
        """The right answers for a few rows."""
        pairs = len(self.out)
        places = torch.linspace(0, pairs - 1, min(pairs, 16), device=self.device).long()
        full = restored(self.w, self.w_scale)
        answers = []
        for place in places.tolist():
            pair = int(self.order[place])
            row = self.exact_x[pair // self.top_k if self.up else place].float()
            y = full[int(self.experts.flatten()[pair])] @ row
            answers.append(torch.nn.functional.silu(y[: self.columns]) * y[self.columns :] if self.up else y)
        self.places = places if self.up else self.order[places].long()
        self.expected = torch.stack(answers)

    def run(self, tile: Tile) -> None:
        launch_experts(self.x, self.x_scale, self.w, self.w_scale, self.order, self.offsets, self.weights, self.out,
                       self.top_k, tile)  # fmt: skip

    def right(self, tile: Tile) -> bool:
        """Whether the tile fits the GPU and gives the oracle's answers."""
        self.out.fill_(float("nan"))
        try:
            self.run(tile)
        except (OutOfResources, triton.CompilationError, RuntimeError, AssertionError):
            return False
        return relative_error(self.out[self.places], self.expected) <= _TOLERANCE.get(self.form, 3e-2)

    def time(self, tile: Tile) -> float:
        """Seconds, with the cache cleared before each call."""
        if self.device.type == "cpu":  # the interpreter is slow, and `right` has run the tile before
            started = time.perf_counter()
            self.run(tile)
            return time.perf_counter() - started
        return seconds(lambda: self.run(tile), self.device, repeats=25)

    def glance(self, tile: Tile, fastest: float) -> float:
        """Seconds of a few calls, or of one where that is far from the fastest; nothing of the kind without a GPU."""
        if self.device.type == "cpu":
            return 0.0
        once = self._mean(tile, 1)
        return once if once > 1.3 * fastest else self._mean(tile, 6)

    def _mean(self, tile: Tile, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(calls):
            self.run(tile)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls


def shapes_alone(kind: str, form: str, shape: Shape, rows: int, gpu: Gpu) -> _Product:
    """A product on the meta device, which has no memory: what it launches can only be recorded."""
    with recorded(gpu):
        product = _Product(kind, form, shape, torch.device("meta"))
        product.take_rows(rows)
    return product


def _search(product: _Product, rule: Tile, others: list[Tile], deadline: float, work: str) -> Tile | None:
    """The fastest of `others` that is right and by `MARGIN` faster than the rule's tile. Prints what was found."""
    glances: list[tuple[float, Tile]] = []
    tried = 0
    for tile in others:
        if time.monotonic() > deadline:
            break
        tried += 1
        if product.right(tile):
            glances.append((product.glance(tile, min((took for took, _ in glances), default=float("inf"))), tile))
    finalists = [tile for _, tile in sorted(glances, key=lambda glance: glance[0])[:_FINALISTS]]
    if product.right(rule):
        finalists.insert(0, rule)
    times: dict[Tile, float] = {}
    for _ in range(1 if product.device.type == "cpu" else 2):  # in turns, so that none has the warmer or cooler GPU
        for tile in finalists:
            times[tile] = min(times.get(tile, float("inf")), product.time(tile))
    before = times.get(rule, float("inf"))
    best = select_clearly_faster(times, rule)
    after = before if best is None else times[best]
    print(f"{product.form} {product.kind}, {work}: {before * 1e3:.3f} -> {after * 1e3:.3f} ms"
          f" ({tried} of {len(others)} tiles tried): {best or 'the rule'}", flush=True)  # fmt: skip
    return best


def select_clearly_faster(times: dict[Tile, float], rule: Tile) -> Tile | None:
    """The fastest tile if it beats the rule's by `MARGIN`, or if the rule's does not run; else None."""
    best = min(times, key=lambda tile: times[tile], default=rule)
    if best == rule or (rule in times and times[best] > times[rule] * (1 - MARGIN)):
        return None
    return best
