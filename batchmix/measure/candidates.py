"""The tiles that `batchmix tune` searches, and their kernels compiled by many processes before any of them is timed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable

import triton

from batchmix.kernels import tiles
from batchmix.kernels.compile import Specialization, compile_in_processes, recorded
from batchmix.kernels.gpu import Gpu
from batchmix.kernels.tiles import Tile

_REGISTERS = 128  # of a thread that accumulators may take; with what else a kernel needs, more would spill
_ACCUMULATORS = {"fp8_block": 2.0, "int4": 1.5}  # beside the sum there are those of one step


def candidates(kind: str, format: str, gpu: Gpu) -> list[Tile]:
    """Tiles that fit the GPU, for any number of rows. The step over K is the format's: it decides how sums are rounded."""
    step, tma = tiles.block_k(format, gpu.arch), gpu.has_tensor_memory_accelerator
    if gpu.arch == "cpu":  # the interpreter: enough to try the code path
        return [Tile(16, 32, step, 2, 4, 2, swap_ab=swap, tma=True) for swap in (False, True)]
    found: dict[Tile, None] = {}
    sizes = itertools.product((16, 32, 64, 128), (128, 256) if tma else (64, 128), (4, 8), (1, 2))
    for (block_m, columns, warps, programs), swap, permute in itertools.product(sizes, (False, True), (False, True)):
        block_n = columns // 2 if kind == "up" else columns
        if tma and (block_n if swap else block_m) < 64:  # wgmma has 64 rows
            continue
        if (swap and not tma) or (permute and (kind != "up" or not tma or block_m < 64)):
            continue
        registers = block_m * columns / (32 * warps) * _ACCUMULATORS.get(format, 1.0)
        if registers > _REGISTERS or (warps == 8 and (programs > 1 or block_m * columns < 64 * 128)):
            continue
        for group in (8, 64) if block_m == 128 else (64,):
            tile = Tile(block_m, block_n, step, group, warps, 2, swap, programs, tma, permute)
            most = min(6, tiles.most_stages(tile, kind, format, gpu))
            for stages in {stages for stages in (3, 4, 6) if stages <= most} or ({2} if most == 2 else ()):
                found[Tile(block_m, block_n, step, group, warps, stages, swap, programs, tma, permute)] = None
    return list(found)


def suits(tile: Tile, rows: int) -> bool:
    """Whether the tile is worth a try for `rows` rows an expert: neither mostly padding nor one of dozens of row tiles."""
    if tile.block_m > max(16, triton.next_power_of_2(rows)) or (tile.block_m < 64 and rows >= 512):
        return False
    if tile.permute and rows <= 64:
        return False
    # Of groups that hold all row tiles of an expert one is enough: they are the same schedule.
    return tile.block_m < 128 or tile.group_m == 8 or rows > 8 * tile.block_m


def compiled(
    launches: Iterable[tuple[Callable[[Tile], object], list[Tile]]], gpu: Gpu, limit: float
) -> list[list[Tile]]:
    """Of each launcher's tiles those whose kernels compile within `limit` seconds in all, and fit the GPU.

    The kernels lie in Triton's cache then. No kernel is compiled twice: many tiles differ in their grid alone.
    """
    started = time.monotonic()
    jobs: dict[str, Specialization] = {}
    needed: list[dict[Tile, list[str]]] = []
    for launch, some in launches:
        needed.append({})
        for tile in some:
            with recorded(gpu) as found:
                launch(tile)
            needed[-1][tile] = [job.identity for job in found]
            jobs |= {job.identity: job for job in found}
    left = max(0.0, limit - (time.monotonic() - started))
    outcomes = dict(zip(jobs, compile_in_processes(list(jobs.values()), limit=left), strict=True))
    fits = {key for key, outcome in outcomes.items() if outcome.error is None and outcome.shared <= gpu.shared_memory}
    print(f"{len(jobs)} kernels, {len(fits)} of them fit, compiled in {time.monotonic() - started:.0f} s", flush=True)
    errors = sorted({outcome.error for outcome in outcomes.values() if outcome.error is not None})
    for error in errors[:3]:
        print(f"  skipped: {error[:200]}", flush=True)
    return [[tile for tile, keys in by_tile.items() if fits.issuperset(keys)] for by_tile in needed]
