from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.kernels import tiles
from batchmix.kernels.gpu import A100, B200, H100, H200, INTERPRETER, MI300X, RTX4090, Gpu
from batchmix.kernels.tiles import (
    CONFIGS,
    FORMATS,
    KINDS,
    Tile,
    heuristic,
    nearest,
    read_table,
    select_tile,
    table_key,
    table_path,
    write_table,
)

SHIPPED = sorted(CONFIGS.glob("*.json"))
GPUS = [A100, RTX4090, H100, H200, B200, MI300X, INTERPRETER]
ROWS = [1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 1000, 16384]
SMALL, LARGE = Tile(16, 64, 64, 64, 4, 6, True, 2, True), Tile(128, 128, 64, 8, 8, 4, False, 1, True, True)
UP = ("up", "bfloat16", 14336, 4096)
GH200 = replace(H200, name="NVIDIA GH200 480GB")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tables of the tests' own."""
    monkeypatch.setattr(tiles, "CONFIGS", tmp_path)
    return tmp_path


def write(gpu: Gpu, found: dict[int, Tile | None], kind: str = "up") -> Path:
    path = table_path(gpu, "bfloat16")
    write_table(path, table_key(kind, 14336, 4096), found)
    return path


def by_rule(rows: int, gpu: Gpu = H200) -> Tile:
    return heuristic("up", "bfloat16", rows, gpu)


def test_a_table_has_the_architecture_the_gpus_name_and_the_format() -> None:
    assert table_path(H200, "bfloat16").name == "sm_90-nvidia_h200-bfloat16.json"
    assert table_path(H100, "int4").name == "sm_90-nvidia_h100_80gb_hbm3-int4.json"


def test_the_nearest_measured_tile_is_chosen() -> None:
    write(H200, {16: SMALL, 32: LARGE, 64: None})
    expected = {12: SMALL, 16: SMALL, 22: SMALL, 23: LARGE, 32: LARGE, 45: LARGE, 46: by_rule(46), 64: by_rule(64)}
    assert {rows: select_tile(*UP, rows, H200) for rows in expected} == expected


def test_a_tile_is_not_used_far_from_where_it_was_measured() -> None:
    write(H200, {16: SMALL, 512: LARGE})
    for rows in (1, 11, 23, 128, 362, 725, 4096, tiles.MANY_ROWS):
        assert select_tile(*UP, rows, H200) == by_rule(rows), rows
    assert select_tile(*UP, 363, H200) == select_tile(*UP, 724, H200) == LARGE
    assert select_tile(*UP, 512, H200, batch_invariant=True) == heuristic(*UP[:2], 512, H200, batch_invariant=True)


def test_tiles_for_prefill_are_used_for_any_number_of_rows_beyond() -> None:
    slow = replace(LARGE, num_stages=3)
    write(H200, {16: SMALL, 1024: slow, 4096: LARGE})
    assert select_tile(*UP, 723, H200) == by_rule(723)
    assert select_tile(*UP, 725, H200) == select_tile(*UP, 2000, H200) == slow
    assert select_tile(*UP, 3000, H200) == select_tile(*UP, 65536, H200) == LARGE
    assert select_tile(*UP, 1, H200, batch_invariant=True) == LARGE


@given(st.dictionaries(st.integers(1, 10000), st.sampled_from([None, SMALL, LARGE])), st.integers(1, 1 << 20))
@settings(deadline=None)
def test_an_entry_answers_near_its_own_number_of_rows(table: dict[int, Tile | None], rows: int) -> None:
    tile = nearest(table, rows)
    near = [
        found for measured, found in table.items()
        if min(measured, rows) >= 1024 or max(measured, rows) ** 2 <= 2 * min(measured, rows) ** 2
    ]  # fmt: skip
    assert tile is None or tile in near
    if rows in table:
        assert tile == table[rows]
    if near and all(found == near[0] for found in near):
        assert tile == near[0]


def test_the_very_gpus_table_comes_first_then_one_of_its_architecture() -> None:
    write(H200, {16: SMALL})
    assert select_tile(*UP, 16, GH200) == select_tile(*UP, 16, H100) == SMALL
    write(H100, {16: LARGE})
    write(GH200, {16: None})
    assert select_tile(*UP, 16, H200) == SMALL
    assert select_tile(*UP, 16, H100) == LARGE
    assert select_tile(*UP, 16, GH200) == by_rule(16), "measured on this GPU: the rule is as good"


def test_a_product_that_the_gpus_own_table_lacks_is_looked_up_in_others() -> None:
    write(H100, {16: LARGE}, kind="linear")
    write(H200, {16: SMALL})
    assert select_tile(*UP, 16, H100) == SMALL


def test_what_is_not_in_a_table_goes_by_rule() -> None:
    write(H200, {16: SMALL})
    assert select_tile("down", "bfloat16", 4096, 14336, 16, H200) == heuristic("down", "bfloat16", 16, H200)
    assert select_tile("up", "fp8", 14336, 4096, 16, H200) == heuristic("up", "fp8", 16, H200)
    for gpu in (A100, B200, MI300X):
        assert select_tile(*UP, 16, gpu) == by_rule(16, gpu)


def test_a_table_keeps_what_it_has_of_other_rows_and_products() -> None:
    path = write(H200, {64: LARGE, 16: None})
    assert select_tile(*UP, 16, H200) == by_rule(16)
    write(H200, {16: SMALL, 4: None})
    assert select_tile(*UP, 16, H200) == SMALL, "what was read before is read again"
    write(H200, {8: SMALL}, kind="linear")
    assert {key: list(by_rows.items()) for key, by_rows in read_table(path).items()} == {
        table_key("up", 14336, 4096): [(4, None), (16, SMALL), (64, LARGE)],
        table_key("linear", 14336, 4096): [(8, SMALL)],
    }


def test_a_table_that_would_change_the_order_of_sums_is_refused() -> None:
    write(H200, {16: SMALL, 1024: replace(LARGE, block_k=128)})
    with pytest.raises(ValueError, match="block_k 128, where bfloat16 on sm_90 sums in steps of 64"):
        select_tile(*UP, 1024, H200)


def test_rows_are_permuted_where_that_was_measured_to_pay() -> None:
    permuted = {rows: by_rule(rows).permute for rows in (64, 96, 128, 129, 144, 256, 4096)}
    assert permuted == {64: False, 96: False, 128: False, 129: True, 144: True, 256: True, 4096: True}
    assert not by_rule(4096, A100).permute, "there is no descriptor that would read them"


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
    assert len({select_tile(kind, format, 14336, 4096, rows, gpu, batch_invariant=True) for rows in ROWS}) == 1


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


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_are_those_of_their_name(path: Path) -> None:
    arch, _, format = path.stem.split("-")
    assert format in FORMATS
    for key, by_rows in read_table(path).items():
        assert key.split()[0] in KINDS
        assert any(by_rows.values()), "a table of nothing but the rule's"
        for rows, tile in by_rows.items():
            assert rows > 0
            assert tile is None or tile.block_k == tiles.block_k(format, arch)


def test_the_h200s_tiles_are_those_of_every_gpu_of_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CONFIGS", CONFIGS)
    for gpu in (H100, H200, GH200):
        assert select_tile(*UP, 144, gpu) == Tile(64, 128, 64, 64, 4, 4, False, 1, True, True)
        assert select_tile("down", "bfloat16", 4096, 14336, 144, gpu) == Tile(64, 256, 64, 64, 4, 4, False, 1, True)
        assert select_tile(*UP, 2048, gpu) == by_rule(2048)
