from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from batchmix.kernels import tiles
from batchmix.kernels.gpu import A100, B200, H100, H200, INTERPRETER, MI300X, RTX4090, Gpu
from batchmix.kernels.tiles import FORMATS, KINDS, Tile, choose, heuristic, table_key, table_path

GPUS = [A100, RTX4090, H100, H200, B200, MI300X, INTERPRETER]
ROWS = [1, 2, 15, 16, 17, 63, 64, 65, 128, 1000, 16384]
SMALL, LARGE = Tile(16, 64, 64, 64, 4, 6, True, 2, True), Tile(128, 128, 64, 8, 8, 4, False, 1, True, True)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """H200's table for bfloat16, with one product in it."""
    monkeypatch.setattr(tiles, "CONFIGS", tmp_path)
    path = table_path(H200, "bfloat16")
    stored = {table_key("up", 14336, 4096): {"16": asdict(SMALL), "1024": asdict(LARGE)}}
    path.write_text(json.dumps(stored))
    return path


def test_a_table_has_the_gpus_name_and_the_format(table: Path) -> None:
    assert table.name == "nvidia_h200-bfloat16.json"
    assert table_path(H100, "int4").name == "nvidia_h100_80gb_hbm3-int4.json"


def test_the_nearest_measured_tile_is_chosen(table: Path) -> None:
    for rows, expected in ((1, SMALL), (16, SMALL), (127, SMALL), (128, LARGE), (1024, LARGE), (65536, LARGE)):
        assert choose("up", "bfloat16", 14336, 4096, rows, H200) == expected
    assert choose("up", "bfloat16", 14336, 4096, 1, H200, batch_invariant=True) == LARGE


def test_what_is_not_in_a_table_goes_by_rule(table: Path) -> None:
    assert choose("down", "bfloat16", 4096, 14336, 16, H200) == heuristic("down", "bfloat16", 16, H200)
    assert choose("up", "bfloat16", 14336, 4096, 16, H100) == heuristic("up", "bfloat16", 16, H100)


def test_a_table_that_would_change_the_order_of_sums_is_refused(table: Path) -> None:
    stored = {table_key("up", 14336, 4096): {"16": asdict(SMALL), "1024": asdict(replace(LARGE, block_k=128))}}
    table.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="block_k 128, where bfloat16 on sm_90 sums in steps of 64"):
        choose("up", "bfloat16", 14336, 4096, 1024, H200)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_rules_keep_to_their_promises(kind: str, format: str, gpu: Gpu) -> None:
    found = {rows: heuristic(kind, format, rows, gpu) for rows in ROWS}
    for rows, tile in found.items():
        assert tile.block_k == tiles.block_k(format, gpu.arch)
        for size in (tile.block_m, tile.block_n, tile.block_k):
            assert size >= 16
            assert size & (size - 1) == 0
        assert tile.block_m >= min(rows, 16)
        assert 2 <= tile.num_stages <= 6
    assert len({choose(kind, format, 14336, 4096, rows, gpu, batch_invariant=True) for rows in ROWS}) == 1


@pytest.mark.parametrize("kilobytes", [64, 99, 163, 227])
@pytest.mark.parametrize("arch", ["sm_75", "sm_86", "sm_120", "sm_200", "gfx1100"])
def test_a_gpu_that_nobody_knows_gets_tiles_that_fit_it(arch: str, kilobytes: int) -> None:
    gpu = Gpu("unknown", arch, 60, kilobytes * 1024)
    for kind, format, rows, batch_invariant in itertools.product(KINDS, FORMATS, ROWS, (False, True)):
        tile = heuristic(kind, format, rows, gpu, batch_invariant)
        assert not tile.tma
        columns = tile.block_n * (2 if kind == "up" else 1)
        # One step in memory; integers count 16 bits, for where they are widened on their way back into it.
        size = {"float32": 4, "fp8": 1, "fp8_block": 1}.get(format, 2)
        assert tile.block_k * (tile.block_m + columns) * size <= kilobytes * 1024
        assert 2 <= tile.num_stages <= 6


def test_shipped_tables_can_be_read() -> None:
    for path in tiles.CONFIGS.glob("*.json"):
        for by_rows in json.loads(path.read_text()).values():
            for rows, tile in by_rows.items():
                assert int(rows) > 0
                Tile(**tile)
