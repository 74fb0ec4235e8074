"""Which tile a matrix product runs with: measured tables where there are any, else rules from the GPU's properties.

A table is kernels/configs/<arch>-<gpu>-<format>.json, written by `batchmix tune`: {"<kind> N=<n> K=<k>": {"<rows>":
{tile}}}, where `rows` is the number of rows that one matrix sees: all of them, or for experts those of an average
expert. null instead of a tile: no tile was clearly faster than the rule's there. A GPU without a table of its own has
that of another one of its architecture.

Bits: the sum over K of an output runs in steps of block_k in the same order whatever the rest of the tile is, and
block_k depends on the format and the architecture alone, in tables too. Whether tensor cores then give the same bits
for tiles of different shapes is for a test on a GPU to say (`test_tiles_of_every_size_give_the_same_bits`);
`batch_invariant` needs no such promise, it takes one tile for any number of rows.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from batchmix.kernels.gpu import Gpu

CONFIGS = Path(__file__).parent / "configs"
MANY_ROWS = 1 << 20
REACH = math.sqrt(2)  # half-way to the next power of two: how far from its number of rows a measured tile is used
PREFILL_ROWS = 1024  # a row tile more or less does not matter from here on, so neither does the distance

# Formats of weights: the dtype's own name for those that are not quantised.
FORMATS = ("float32", "float16", "bfloat16", "fp8", "fp8_block", "int8", "int4")
KINDS = ("up", "down", "linear")  # "up" has two accumulators of block_n columns each, gate and up


@dataclass(frozen=True)
class Tile:
    """How one program works on an output tile, and how programs share the tiles."""

    block_m: int  # rows of x
    block_n: int  # rows of the weight matrix
    block_k: int
    group_m: int  # row tiles that run before the next column of weights is read
    num_warps: int
    num_stages: int
    swap_ab: bool  # w x^T instead of x w^T: wgmma's 64 rows are then weights, which there are always enough of
    programs_per_sm: int = 1
    tma: bool = False  # weights through a tensor descriptor
    permute: bool = False  # experts: copy x into expert order first, and load it through a descriptor too


def select_tile(kind: str, format: str, n: int, k: int, rows: int, gpu: Gpu, batch_invariant: bool = False) -> Tile:
    """The tile for `rows` rows of x against weights [n, k]; `n` counts the output's columns."""
    return _choose(CONFIGS, kind, format, n, k, MANY_ROWS if batch_invariant else max(rows, 1), gpu, batch_invariant)


@functools.lru_cache(4096)  # it takes longer than a launch
def _choose(folder: Path, kind: str, format: str, n: int, k: int, rows: int, gpu: Gpu, batch_invariant: bool) -> Tile:
    path, table = _measured(folder, gpu, format, table_key(kind, n, k))
    tile = nearest(table, rows)
    if tile is None:
        return heuristic(kind, format, rows, gpu, batch_invariant)
    step = block_k(format, gpu.arch)
    if tile.block_k != step:
        raise ValueError(f"{path}: block_k {tile.block_k}, where {format} on {gpu.arch} sums in steps of {step}")
    return tile


def table_path(gpu: Gpu, format: str) -> Path:
    """Where the measured tiles of this GPU and format are, if there are any."""
    return CONFIGS / f"{gpu.arch}-{re.sub(r'[^a-z0-9]+', '_', gpu.name.lower()).strip('_')}-{format}.json"


def table_key(kind: str, n: int, k: int) -> str:
    """The name of one product in a table."""
    return f"{kind} N={n} K={k}"


def nearest(table: dict[int, Tile | None], rows: int) -> Tile | None:
    """The tile measured at the number of rows nearest to `rows`, by ratio; the larger number wins a tie.

    None where the rule was as good there, or where nothing was measured within `REACH`: a tile for decoding says nothing
    about prefill. Numbers from `PREFILL_ROWS` on reach all others from there on.
    """

    def distance(measured: int) -> float:
        return abs(math.log(measured / rows))

    near = [
        measured for measured in sorted(table, reverse=True)
        if min(measured, rows) >= PREFILL_ROWS or distance(measured) <= math.log(REACH)
    ]  # fmt: skip
    return table[min(near, key=distance)] if near else None


@functools.cache
def _measured(folder: Path, gpu: Gpu, format: str, key: str) -> tuple[Path | None, dict[int, Tile | None]]:
    """What was measured for one product, and where it is written: on this very GPU, else on one of its architecture."""
    own = folder / table_path(gpu, format).name
    for path in (own, *sorted(folder.glob(f"{gpu.arch}-*-{format}.json"))):
        if key in (table := read_table(path)):
            return path, table[key]
    return None, {}


def read_table(path: Path) -> dict[str, dict[int, Tile | None]]:
    """The products in a table, and the tile for each number of rows; nothing where there is no file."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    return {
        key: {int(rows): tile and Tile(**tile) for rows, tile in by_rows.items()} for key, by_rows in stored.items()
    }


def write_table(path: Path, key: str, found: dict[int, Tile | None]) -> None:
    """Put what was measured for one product into a table; what it has of other products and numbers of rows stays."""
    table = read_table(path)
    table[key] = dict(sorted((table.get(key, {}) | found).items()))
    stored = {
        key: {str(rows): tile and asdict(tile) for rows, tile in by_rows.items()} for key, by_rows in table.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1) + "\n")
    _measured.cache_clear()
    _choose.cache_clear()


def block_k(format: str, arch: str) -> int:
    """The step of the sum over K: 128 bytes of a weight's row, or the group that shares a scale."""
    if format in ("fp8", "fp8_block", "int8", "int4"):
        return 128
    if arch == "cpu" or format == "float32":
        return 32
    return 64


def heuristic(kind: str, format: str, rows: int, gpu: Gpu, batch_invariant: bool = False) -> Tile:
    """A tile by rule. Starting points are vLLM's tables for Mixtral on H100 and H200, where no comment says otherwise."""
    if gpu.arch == "cpu":  # the interpreter: small enough for tests to have many tiles
        tile = Tile(16, 32, block_k(format, "cpu"), 2, 4, 2, swap_ab=rows < 16)
        return replace(tile, tma=True, permute=rows >= 64)
    has_descriptors = gpu.has_tensor_memory_accelerator
    step = block_k(format, gpu.arch)
    few = rows <= 64
    # 16 to 64 rows: each weight leaves memory once and tensor cores have time to spare.
    block_m = min(64, max(16, 1 << (rows - 1).bit_length())) if few else 128
    total_n, warps = (128, 4) if few else (256, 8)  # columns of all accumulators
    swap = has_descriptors and few
    if kind == "linear" and few:
        total_n = 64  # 4096 columns are then 64 tiles: more multiprocessors share the reading
    elif kind == "linear" and batch_invariant and has_descriptors:
        total_n, warps = 128, 4  # between what many rows and what few rows would have
    if not has_descriptors:
        total_n = min(total_n, 128)  # registers of mma.sync, and 64 KB of shared memory on AMD
    if format == "float32":  # plain multiply-adds, no tensor cores
        block_m, total_n, warps, swap = min(block_m, 32), 64, 4, False
    elif format == "fp8_block":  # a second accumulator for the block's partial sum
        total_n = 64 if gpu.arch in ("sm_100", "sm_103") else 128
    elif format == "int8":
        swap = has_descriptors  # weights widened in registers can feed wgmma from there only as the left operand
        total_n = 128 if kind == "down" else total_n  # 256 x 128 in one accumulator spills
    elif format == "int4":  # two partial sums beside the accumulator
        block_m, swap = min(block_m, 64), has_descriptors
        if block_m == 64 and (kind == "down" or not has_descriptors):
            total_n //= 2
    block_n = total_n // 2 if kind == "up" else total_n
    tile = Tile(block_m, block_n, step, 64 if few else 8, warps, 2, swap, tma=has_descriptors)
    # On an H200 in bfloat16 (8x7B, up): 0.74 instead of 0.96 ms at 144 rows an expert, where two tiles are mostly padding,
    # 0.72 instead of 0.73 at 256; no gain at 96 (0.50), and 512 is in the table without. 4,096 rows were measured with it
    # only: 642 TFLOP/s in all.
    permute = has_descriptors and rows > 128
    tile = replace(tile, permute=permute, programs_per_sm=2 if warps == 4 else 1)
    return replace(tile, num_stages=min(6, max(2, most_stages(tile, kind, format, gpu))))


def most_stages(tile: Tile, kind: str, format: str, gpu: Gpu) -> int:
    """How many steps over K shared memory holds at once."""
    x_bytes = {"float32": 4, "fp8": 1, "fp8_block": 1}.get(format, 2)
    w_bits = {"float32": 32, "fp8": 8, "fp8_block": 8, "int8": 8, "int4": 4}.get(format, 16)
    columns = tile.block_n * (2 if kind == "up" else 1)
    stage = tile.block_k * (tile.block_m * x_bytes + columns * w_bits // 8)
    # Beside the stages only barriers: the epilogue turns its tile around in their memory.
    return (gpu.shared_memory // tile.programs_per_sm - 2048) // stage


def format_of(dtype: torch.dtype) -> str:
    """The format of weights that are not quantised."""
    return str(dtype).removeprefix("torch.")
