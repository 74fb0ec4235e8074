"""A rerun finds every byte that differs from what was read before, and nothing where the bytes are the same."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

from batchmix.input.config import DataConfig, ShardConfig
from batchmix.input.read_log import Extent, compact
from batchmix.input.rowset import RowSet
from batchmix.input.source import Source, open_source

ROWS = 6000
TEXTS = [random.Random(row).randbytes(60).hex() for row in range(ROWS)]
TABLE = pa.table({"id": range(ROWS), "prompt": TEXTS, "other": TEXTS[::-1]})
LINES = "".join(json.dumps({"id": row, "prompt": text}) + "\n" for row, text in enumerate(TEXTS)).encode()
CSV = ("id,prompt\n" + "".join(f"{row},{text}\n" for row, text in enumerate(TEXTS))).encode()


def arrow_stream(path: Path) -> None:
    with pa.ipc.new_stream(path, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=500)


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(LINES),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES, mtime=0)),
    "rows.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(LINES)),
    "rows.csv": lambda path: path.write_bytes(CSV),
    "rows.parquet": lambda path: pq.write_table(TABLE, path, row_group_size=500),
    "rows.feather": lambda path: pa.feather.write_feather(TABLE, str(path), chunksize=500, compression="zstd"),
    "rows.arrow": arrow_stream,
}


def source(path: Path | str, **data: object) -> Source:
    return open_source(DataConfig(path=str(path), columns=["id"], **data), ShardConfig())  # type: ignore[arg-type]


def read_half(path: Path | str) -> list[Extent]:
    """What a run that is killed after some 3000 rows has read, as its commits tell it."""
    opened = source(path)
    rows = opened.rows(RowSet())
    extents: list[Extent] = []
    for _ in range(3):
        assert len(list(islice(rows, 1000))) == 1000
        extents += opened.new_extents()
    rows.close()  # type: ignore[attr-defined]
    return extents + opened.new_extents()


def ranges(extents: list[Extent]) -> list[tuple[int, int]]:
    return [part for extent in extents for part in extent.ranges]


@pytest.mark.parametrize("name", WRITERS)
def test_any_byte_that_was_read_counts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    extents = read_half(path)
    assert source(path).find_change(extents, None) is None
    good = path.read_bytes()
    size = len(good)
    assert size > 300_000
    read = ranges(extents)
    covered = sum(stop - start for start, stop in set(ranges(compact(extents))))
    assert size // 6 < covered <= size
    stat = path.stat()
    opened = source(path)
    for place in random.Random(0).choices(range(size), k=25):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        change = opened.find_change(extents, None)
        assert (change is not None) == any(start <= place < stop for start, stop in read), place
        if change is not None:
            assert change.startswith(f"{path} has changed between its bytes ")
    path.write_bytes(good[: size // 8])
    assert opened.find_change(extents, None) is not None, "cut off"
    copy = tmp_path / "elsewhere" / f"copy-{name}"
    copy.parent.mkdir()
    path.write_bytes(good)
    shutil.copy(path, copy)
    os.utime(copy, (1, 1))
    assert source(copy).find_change(extents, None) is None, "the same bytes of another time elsewhere"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_all_files_count_and_are_told_apart(tmp_path: Path, name: str) -> None:
    for number in range(3):
        WRITERS[name](tmp_path / f"{number}-{name}")
    opened = source(tmp_path)
    assert len(list(islice(opened.rows(RowSet()), 2 * ROWS + 100))) == 2 * ROWS + 100
    extents = opened.new_extents()
    assert {extent.file for extent in extents} == {0, 1, 2}
    assert source(tmp_path).find_change(extents, None) is None
    second = tmp_path / f"1-{name}"
    good = second.read_bytes()
    place = len(good) // 2
    second.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    change = source(tmp_path).find_change(extents, None)
    assert change is not None
    assert change.startswith(f"{second} has changed")


def test_two_who_read_the_same_bytes_and_saw_others_are_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)
    extents = read_half(path)
    seen_by_another = Extent(0, extents[-1].ranges, "0" * 32)
    for found in ([*extents, seen_by_another], [seen_by_another, *extents]):
        assert source(path).find_change(found, None) is not None


def test_files_of_a_store_are_read_again_only_where_their_version_is_another() -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/read-log/rows.jsonl", LINES)
    url = "memory://read-log/rows.jsonl"
    extents, version = read_half(url), source(url).versions()
    assert version[0]
    store.pipe("/read-log/rows.jsonl", LINES)
    again = source(url)
    assert again.versions() != version
    assert again.find_change(extents, version) is None, "the same bytes, stored anew"
    store.pipe("/read-log/rows.jsonl", LINES[:5000] + b"x" + LINES[5001:])
    changed = source(url)
    assert changed.find_change(extents, version) is not None
    assert changed.find_change(extents, changed.versions()) is None, "not read again"


def test_compact_keeps_what_covers_the_rest() -> None:
    short, long = Extent(0, ((0, 5),), "a"), Extent(0, ((0, 9),), "b")
    other, groups = Extent(1, ((0, 7),), "c"), Extent(0, ((3, 4), (9, 10)), "d")
    assert compact([short, groups, long, other, groups, short]) == [long, other, groups]
