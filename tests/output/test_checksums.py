"""Parts whose bytes are not those that were written are found and named, whatever byte it is and whoever reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slow_cases import slow_after

from batchmix.errors import BatchmixError
from batchmix.input.config import ShardConfig
from batchmix.input.read_log import Extent
from batchmix.output.checksums import Checksums
from batchmix.output.columns import OutputColumns
from batchmix.output.config import OutputFormat
from batchmix.output.lease import Lease
from batchmix.output.merge import merge_in_order
from batchmix.output.part_formats import part_format
from batchmix.output.parts import Parts
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig
from batchmix.storage import LocalFolder, Storage
from batchmix.storage.bookkeeping import CHECKSUMS, WORKERS
from batchmix.storage.object_store import ObjectStore

FORMATS = {"arrow": (OutputFormat.arrow, None), "parquet": (OutputFormat.parquet, None),
           "jsonl": (OutputFormat.jsonl, None), "openai": (OutputFormat.jsonl, "m")}  # fmt: skip


def parts_in(storage: Storage, form: str, compression: str | None = "zstd") -> Parts:
    storage.make_folder(WORKERS)
    storage.make_folder(CHECKSUMS)
    columns = OutputColumns(pa.schema([("text", pa.string())]), token_ids=False, logprobs=False)
    kind, model = FORMATS[form]
    return Parts(storage, part_format(kind, columns, compression, model))


def completion(row: int) -> Completion:
    prompt = Prompt(row, str(row), {"text": f"this is row {row}"}, [1, 2], SamplingConfig())
    return Completion(prompt, 0, [3], "stop", num_tokens=1, text=f"the answer to row {row}")


def commit(parts: Parts, number: int, rows: range, extents: list[Extent] | None = None) -> str:
    name = parts.name(0, number)
    assert parts.create(name, parts.format.records([completion(row) for row in rows]), extents or [])
    return name


@pytest.mark.parametrize("compression", slow_after(1, ["zstd", None]))
@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_found(tmp_path: Path, form: str, compression: str | None, data: st.DataObject) -> None:
    storage = LocalFolder(tmp_path)
    if not (tmp_path / CHECKSUMS).exists():
        commit(parts_in(storage, form, compression), 0, range(50))
    parts = parts_in(storage, form, compression)
    name = parts.names()[0]
    good = (tmp_path / name).read_bytes()
    assert parts.keys(name).row.tolist() == list(range(50))
    place, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
    bad = bytearray(good)
    bad[place] ^= 1 << bit
    try:
        (tmp_path / name).write_bytes(bad)
        for read in (lambda parts: parts.keys(name), lambda parts: list(parts.batches(name)), Parts.totals):
            with pytest.raises(BatchmixError, match=f"{name}: cannot be read back .*if the file is damaged, delete it"):
                read(parts_in(storage, form, compression))
    finally:
        (tmp_path / name).write_bytes(good)


@pytest.mark.parametrize("form", FORMATS)
def test_parts_that_are_cut_off_emptied_or_another_are_found(tmp_path: Path, form: str) -> None:
    parts = parts_in(LocalFolder(tmp_path), form)
    name, other = commit(parts, 0, range(5)), commit(parts, 1, range(5, 9))
    good = (tmp_path / name).read_bytes()
    empty = parts.storage.create("_empty", parts.format.write_empty) and (tmp_path / "_empty").read_bytes()
    for bad in (good[:-1], good + b"\n", b"", empty, (tmp_path / other).read_bytes()):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(BatchmixError, match=f"{name}: cannot be read back"):
            parts_in(parts.storage, form).keys(name)


@pytest.mark.parametrize("form", FORMATS)
def test_a_merge_refuses_a_damaged_part_and_its_own_parts_have_checksums(tmp_path: Path, form: str) -> None:
    parts = parts_in(LocalFolder(tmp_path), form)
    commit(parts, 0, range(4, 8))
    name = commit(parts, 1, range(4), [Extent(0, ((0, 5),), "ab")])
    good = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(good[:20] + bytes([good[20] ^ 4]) + good[21:])
    with pytest.raises(BatchmixError, match=f"{name}: cannot be read back"):
        merge_in_order(parts_in(parts.storage, form), 3, 1)
    (tmp_path / name).write_bytes(good)
    merge_in_order(parts, 3, 2)
    parts.checksums.sweep(parts.names())
    again = parts_in(parts.storage, form)
    assert list(again.rows(again.names())) == list(range(8))
    assert {path.name.rpartition(".")[0] for path in (tmp_path / CHECKSUMS).glob("part-*")} == set(again.names())
    assert again.checksums.extents() == [Extent(0, ((0, 5),), "ab")]
    parts.checksums.sweep(parts.names())  # nothing to do
    assert again.checksums.extents() == [Extent(0, ((0, 5),), "ab")]


def test_a_part_without_a_checksum_is_read_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = parts_in(LocalFolder(tmp_path), "arrow")
    names = [commit(parts, number, range(3)) for number in range(2)]
    for path in (tmp_path / CHECKSUMS).iterdir():
        path.unlink()
    (tmp_path / CHECKSUMS).rmdir()
    old = Parts(parts.storage, parts.format)
    assert len([old.keys(name) for name in names]) == 2
    assert caplog.text.count("has no checksum in .batchmix/checksums") == 1
    assert f"{names[0]} has no checksum" in caplog.text


@pytest.mark.parametrize("where", ["folder", "object store"])
def test_who_comes_too_late_leaves_the_checksum_of_another_part_and_no_harm(tmp_path: Path, where: str) -> None:
    storage = LocalFolder(tmp_path) if where == "folder" else ObjectStore(f"memory://{tmp_path}")
    parts = parts_in(storage, "jsonl")
    lease = Lease(storage, "00000-of-00001", ShardConfig(), "shard 0 of 1")
    lease.publish([0], 0, "")
    lease.close()
    lease.record.state = "running"
    parts.seal(lease.record) if storage.acts_late else parts._create(parts.name(0, 0), parts.format.write_empty)
    late = parts.format.records([completion(0)])
    assert not parts.create(parts.name(0, 0), late)
    again = parts_in(storage, "jsonl")
    assert len(again.keys(again.name(0, 0))) == 0
    assert len(storage.names(f"{CHECKSUMS}/part-00000-000000.jsonl.*")) == 2


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, "[1]", '[{"file": 0}]', '[{"file": 0, "ranges": [1], "xxh3_128": ""}]']
)
def test_a_damaged_list_of_what_was_read_is_named(tmp_path: Path, text: str) -> None:
    parts = parts_in(LocalFolder(tmp_path), "arrow")
    commit(parts, 0, range(3))
    path = next((tmp_path / CHECKSUMS).iterdir())
    path.write_text(text)
    with pytest.raises(BatchmixError, match=f"{path.name}: is damaged"):
        Checksums(parts.storage).extents()


@pytest.mark.parametrize("name", ["part-00000-000001.arrow.77", "read-77"])
def test_what_a_killed_writer_left_half_is_no_checksum(tmp_path: Path, name: str) -> None:
    parts = parts_in(LocalFolder(tmp_path), "arrow")
    extent = Extent(0, ((0, 9),), "x")
    part = commit(parts, 0, range(5), [extent])
    half = tmp_path / CHECKSUMS / f".{name}.0305b56c.tmp"
    half.write_text("[{")
    assert parts.checksums.extents() == [extent]
    parts.checksums.sweep([part])
    assert not half.exists()
    assert parts.checksums.extents() == [extent]


def test_status_reads_no_more_than_it_shows(tmp_path: Path) -> None:
    parts = parts_in(LocalFolder(tmp_path), "jsonl")
    name = commit(parts, 0, range(3))
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace("the answer to row 1", "the answer to row 7"))
    assert json.loads(text.splitlines()[0])["row"] == 0
    assert parts.unchecked().totals().rows == 3
