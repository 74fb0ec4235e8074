from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import signal
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.errors import BatchmixError, Interrupted
from batchmix.input import input_files, text_readers
from batchmix.input.config import DataConfig, DataFormat, ShardConfig
from batchmix.input.hub import HubInput
from batchmix.input.rowset import AllBut, RowSet
from batchmix.input.source import Source, check_apart, open_source
from batchmix.records import InputRow
from batchmix.signals import StopSignals

ROWS = [
    {"prompt": f"p{number}", "number": number, "score": number / 2, "good": number % 2 == 0} for number in range(10)
]
SCHEMA = pa.schema(
    [("prompt", pa.string()), ("number", pa.int64()), ("score", pa.float64()), ("good", pa.bool_())]
)  # fmt: skip


def write(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema = SCHEMA) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = pa.Table.from_pylist(list(rows), schema=schema)
    name = path.name
    if name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, schema.names, quoting=csv.QUOTE_NOTNULL if hasattr(csv, "QUOTE_NOTNULL") else 1
            )
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=3)
    elif name.endswith(".arrow"):
        new = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
        with new(path, schema) as out:
            out.write_table(table, max_chunksize=3)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(lines))
    else:
        path.write_bytes(lines)
    return path


NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "stream.arrow", "a.csv"]


def source(path: object, index: int = 0, count: int = 1, **data: Any) -> Source:
    return open_source(DataConfig(path if isinstance(path, list) else str(path), **data), ShardConfig(index, count))


def rows_of(path: object, *args: int, done: Sequence[int] = (), **data: Any) -> list[InputRow]:
    return list(source(path, *args, **data).rows(RowSet(done)))


def error_of(path: object, **data: Any) -> str:
    with pytest.raises(BatchmixError) as caught:
        source(path, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def jsonl(tmp_path: Path, *rows: Any, name: str = "a.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


# Formats


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    opened = source(path)
    assert opened.schema == SCHEMA
    assert opened.num_rows == (10 if name == "a.parquet" else None)
    assert list(opened.rows(RowSet())) == [InputRow(number, str(number), row) for number, row in enumerate(ROWS)]
    assert opened.num_rows == 10, "known once all have been read"


text = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=6)
table_rows = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": text,
            "number": st.integers(-(2**53), 2**53) | st.none(),
            "score": st.floats(allow_nan=False) | st.none(),
            "good": st.booleans() | st.none(),
        }
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=30, deadline=None)
@given(rows=table_rows, count=st.integers(1, 4), done=st.sets(st.integers(0, 12)), limit=st.none() | st.integers(1, 13))
def test_formats_agree_shards_partition_and_done_rows_are_left_out(
    rows: list[dict[str, Any]], count: int, done: set[int], limit: int | None
) -> None:
    first = {"prompt": "p", "number": 1, "score": 1.5, "good": True}  # each column has a type
    rows = [first, *rows]
    expected = [InputRow(number, str(number), row) for number, row in enumerate(rows)][:limit]
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            path = write(Path(folder, name), rows)
            assert rows_of(path, limit=limit) == expected, name
            shards = [rows_of(path, index, count, limit=limit, done=sorted(done)) for index in range(count)]
            for index, shard in enumerate(shards):
                assert all(row.row % count == index for row in shard)
            found = sorted((row for shard in shards for row in shard), key=lambda row: row.row)
            assert found == [row for row in expected if row.row not in done], name


def test_ordinals_run_over_a_mixed_list_of_files_folders_and_globs(tmp_path: Path) -> None:
    for folder in ("one", "two/sub", "three"):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / "one/b.parquet", ROWS[:3])
    write(tmp_path / "one/a.csv", ROWS[3:4])
    (tmp_path / "one/README.md").write_text("read me")
    (tmp_path / "one/_meta.jsonl").write_text("{}")
    (tmp_path / "one/.hidden.jsonl").write_text("{}")
    write(tmp_path / "two/sub/c.arrow", ROWS[4:6])
    write(tmp_path / "three/x1.jsonl.gz", ROWS[6:7])
    write(tmp_path / "three/x2.jsonl", ROWS[7:])
    paths = [f"{tmp_path}/one", tmp_path / "two", f"{tmp_path}/three/x*"]
    expected = [ROWS[3], *ROWS[:3], *ROWS[4:]]
    assert rows_of(paths) == [InputRow(number, str(number), row) for number, row in enumerate(expected)]
    assert [row.row for row in rows_of(paths, 1, 3, done=[4])] == [1, 7]
    assert [row.row for row in rows_of(paths, limit=5)] == [0, 1, 2, 3, 4]


def test_urls_of_other_file_systems(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    memory = fsspec.filesystem("memory")
    memory.pipe("/bm/a.parquet", path.read_bytes())
    memory.pipe("/bm/b.jsonl.gz", gzip.compress(json.dumps(ROWS[0]).encode()))
    memory.pipe("/bm/_x.jsonl", b"{}")
    assert [row.columns for row in rows_of("memory://bm")] == [*ROWS, ROWS[0]]
    assert [row.columns for row in rows_of("memory://bm/*.parquet")] == ROWS
    assert [row.columns for row in rows_of(f"file://{path}")] == ROWS
    assert "memory:///bm/_x.jsonl" in error_of("memory://bm/_x.jsonl").replace("memory://bm", "memory:///bm")
    archive = tmp_path / "z.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("in/a.jsonl", json.dumps(ROWS[0]))
    assert [row.columns for row in rows_of(f"zip://in/*.jsonl::{archive}")] == ROWS[:1]


def test_a_file_whose_name_has_glob_characters_or_is_no_text(tmp_path: Path) -> None:
    assert len(rows_of(write(tmp_path / "a[1]*.jsonl", ROWS))) == 10
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    odd.write_bytes(b'{"prompt": "x"}\n{\n')
    bad = rows_of(odd)[1]
    assert bad.error is not None
    bad.error.encode()


def test_a_folder_whose_name_has_glob_characters(tmp_path: Path) -> None:
    (tmp_path / "a[1]*").mkdir()
    write(tmp_path / "a[1]*" / "a.jsonl", ROWS)
    assert len(rows_of(tmp_path / "a[1]*")) == 10


# Bad rows


def test_a_file_whose_end_was_never_written(tmp_path: Path) -> None:
    """A crash leaves zeros there on many file systems."""
    rows = rows_of(jsonl(tmp_path, ROWS[0], bytes(5000)))
    assert [row.error is None for row in rows] == [True, False]


def test_bad_lines_are_error_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path, ROWS[0], b"", b"{bad", b"[1]", b'{"prompt": "\xff"}', ROWS[4])
    rows = rows_of(path)
    assert [row.row for row in rows] == [0, 1, 2, 3, 4]
    assert [row.error is None for row in rows] == [True, False, False, False, True]
    assert rows[1].error == (
        f"{path}, row 2: the line is no JSON: Expecting property name enclosed in double quotes at character 2"
    )
    assert rows[1].columns == {}


def test_values_that_do_not_fit_are_error_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_files, "_SAMPLE_ROWS", 2)
    rows = rows_of(jsonl(tmp_path, *ROWS[:2], {"prompt": 5, "number": 2.5}, {"prompt": "\ud800"}, ROWS[3]))
    assert [row.error is None for row in rows] == [True, True, False, False, True]
    assert rows[2].error == "column 'prompt' holds 5, which is no string"
    assert rows[2].columns == {"prompt": None, "number": None}
    path = tmp_path / "b.csv"
    path.write_text("prompt,number,good\n1,1,true\n2,2,\n3,007,FALSE\n4,1.5,true\n5,x,maybe\n")
    opened = source(path)
    assert opened.schema == pa.schema([("prompt", pa.string()), ("number", pa.int64()), ("good", pa.bool_())])
    rows = list(opened.rows(RowSet()))
    assert [row.columns for row in rows[:3]] == [
        {"prompt": "1", "number": 1, "good": True},
        {"prompt": "2", "number": 2, "good": None},
        {"prompt": "3", "number": 7, "good": False},
    ]
    assert rows[3].error == "column 'number' holds '1.5', which is no int64"
    assert rows[4].columns == {"prompt": "5", "number": None, "good": None}


def test_columns_first_seen_after_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(input_files, "_SAMPLE_ROWS", 1)
    path = jsonl(tmp_path, {"prompt": "a"}, {"prompt": "b", "late": 1}, {"prompt": "c", "late": 1})
    with caplog.at_level(logging.WARNING):
        opened = source(path)
        rows = list(opened.rows(RowSet()))
    assert opened.schema.names == ["prompt"]
    assert [row.error for row in rows] == [None] * 3
    assert caplog.messages == ["columns or keys first seen after the sample are left out of the output: 'late'"]


def test_the_sample_goes_on_in_the_next_file(tmp_path: Path) -> None:
    paths = [str(jsonl(tmp_path, {"prompt": "a"})), str(jsonl(tmp_path, {"prompt": "b", "n": 1}, name="b.jsonl"))]
    assert source(paths).schema.names == ["prompt", "n"]


def test_ids_and_samplings(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "key": "x", "sampling": {"max_tokens": 5}},
        {"prompt": "b", "key": "x", "sampling": '{"seed": 1}'},
        {"prompt": "c", "key": None, "sampling": None},
        {"prompt": "d", "key": "\ud800"},
        {"prompt": "e", "key": 7, "sampling": "nonsense"},
        {"prompt": "f", "key": "y", "sampling": [1]},
        {"prompt": "g", "key": "z", "sampling": "[" * 100_000},
    ]
    rows = rows_of(jsonl(tmp_path, *lines), id_column="key")
    assert [row.id for row in rows] == ["x", "x", "2", "3", "7", "y", "z"]
    assert [row.sampling for row in rows[:3]] == [{"max_tokens": 5}, {"seed": 1}, None]
    assert [row.error is None for row in rows] == [True, True, False, False, False, False, False]
    assert rows[4].error == "column 'sampling' holds 'nonsense', not an object of sampling keys"
    assert rows[6].error is not None
    assert len(rows[6].error) < 200


def test_csv_ids_and_prompts_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,key,sampling\n1,1.50,"{""seed"": 1}"\n2,2,\n')
    opened = source(path, id_column="key")
    assert opened.schema == pa.schema([("prompt", pa.string()), ("key", pa.string()), ("sampling", pa.string())])
    rows = list(opened.rows(RowSet()))
    assert [(row.id, row.columns["prompt"], row.sampling) for row in rows] == [
        ("1.50", "1", {"seed": 1}),
        ("2", "2", None),
    ]


# Columns


@pytest.mark.parametrize("name", NAMES)
def test_only_some_columns_are_kept(tmp_path: Path, name: str) -> None:
    opened = source(write(tmp_path / name, ROWS), columns=["score", "number", "score"], template="{{ prompt }}")
    assert opened.schema == pa.schema([SCHEMA.field("score"), SCHEMA.field("number")])
    row = next(opened.rows(RowSet()))
    assert {key: row.columns[key] for key in ("prompt", "score", "number")} == {
        "prompt": "p0",
        "score": 0.0,
        "number": 0,
    }
    assert ("good" in row.columns) == name.endswith((".jsonl", ".gz", ".zst", ".csv"))
    assert source(tmp_path / name, columns=[]).schema.names == []


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_column_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    has = "it has prompt, number, score, good"
    assert error_of(path, columns=["nummer"]) == (
        f"{path}: no column 'nummer' (data.columns); {has}; did you mean 'number'?"
    )
    assert error_of(path, id_column="xyz") == f"{path}: no column 'xyz' (data.id_column); {has}"
    assert f"{path}: no column 'promt' (data.template)" in error_of(path, template="{{ promt }} {{ range(3) }}")
    message = error_of(path, prompt_column="promptt")
    assert message == f"{path}: no column 'promptt' (data.prompt_column); {has}; did you mean 'prompt'?"
    other = write(tmp_path / f"b{name}", [{"promt": "x"}], pa.schema([("promt", pa.string())]))
    assert error_of(other) == (
        f"{other}: has none of the columns 'prompt_token_ids', 'messages', 'prompt'; name the prompt's column in"
        " data.prompt_column or set data.template; its columns are promt; is it 'promt'?"
    )


@pytest.mark.parametrize("name", ["b.parquet", "b.arrow", "b.csv"])
def test_a_later_file_without_the_column_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.parquet", ROWS)
    later = write(tmp_path / name, [{"text": "x"}], pa.schema([("text", pa.string())]))
    assert error_of(tmp_path).startswith(f"{later}: has none of the columns")


def test_files_with_other_columns_and_types_are_merged(tmp_path: Path) -> None:
    small = pa.schema([("prompt", pa.large_string()), ("number", pa.int32()), ("label", pa.null())])
    write(tmp_path / "a.parquet", [{"prompt": "a", "number": 1}], small)
    write(tmp_path / "b.arrow", [{"prompt": "b", "number": 2**40, "label": "x", "new": 1.5}],
          pa.schema([("prompt", pa.string()), ("number", pa.int64()), ("label", pa.string()), ("new", pa.float64())]))  # fmt: skip
    jsonl(tmp_path, {"prompt": "c", "number": 3, "new": 2}, name="c.jsonl")
    opened = source(tmp_path)
    assert opened.schema == pa.schema(
        [("prompt", pa.large_string()), ("number", pa.int64()), ("label", pa.string()), ("new", pa.float64())]
    )
    rows = list(opened.rows(RowSet()))
    assert [row.error for row in rows] == [None] * 3
    for field in opened.schema:
        pa.array([row.columns.get(field.name) for row in rows], field.type)


def test_types_that_do_not_go_together_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS)
    path = write(tmp_path / "b.arrow", [{"prompt": "x", "number": "y"}],
                 pa.schema([("prompt", pa.string()), ("number", pa.string())]))  # fmt: skip
    assert error_of(tmp_path) == f"{path}: column 'number' is string, but int64 in {tmp_path}/a.parquet"
    path.unlink()
    path = jsonl(tmp_path, {"prompt": "x", "number": "y"}, name="c.jsonl")
    assert error_of(tmp_path) == f"{path}: column 'number' is string, but int64 in {tmp_path}/a.parquet"


def test_odd_schemas(tmp_path: Path) -> None:
    required = pa.schema(
        [pa.field("prompt", pa.string(), nullable=False), ("kind", pa.dictionary(pa.int8(), pa.string()))]
    )
    path = write(tmp_path / "a.arrow", [{"prompt": "x", "kind": "k"}], required)
    assert source(path).schema == pa.schema([("prompt", pa.string()), ("kind", pa.string())])
    twice = pa.table([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "b.parquet")
    assert error_of(tmp_path / "b.parquet") == f"{tmp_path}/b.parquet: has two columns 'prompt'"
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])])
    table = pa.table({"prompt": ["x"], "u": union})
    with pa.ipc.new_file(tmp_path / "c.arrow", table.schema) as writer:
        writer.write_table(table)
    assert "column 'u' is sparse_union" in error_of(tmp_path / "c.arrow")
    assert [row.columns for row in rows_of(tmp_path / "c.arrow", columns=["prompt"])] == [{"prompt": "x"}]


# How much is read


class Counted:
    """Bytes read from a file of the memory file system."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fsspec.implementations.memory import MemoryFile

        self.bytes = 0
        read = MemoryFile.read

        def counting(file: Any, size: int = -1) -> bytes:
            data: bytes = read(file, size)
            self.bytes += len(data)
            return data

        monkeypatch.setattr(MemoryFile, "read", counting)


@pytest.mark.parametrize(
    ("index", "count", "done"), [(0, 1, []), (0, 3, []), (1, 3, []), (0, 1, range(100)), (0, 1, [99])]
)
def test_nothing_is_read_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch, index: int, count: int, done: Sequence[int]
) -> None:
    line = json.dumps({"prompt": "x" * 1000}).encode() + b"\n"
    memory = fsspec.filesystem("memory")
    memory.pipe("/big/a.jsonl", line * 20_000)
    memory.pipe("/big/b.jsonl", line)
    opened = source(["memory://big/a.jsonl", "memory://big/b.jsonl"], index, count, limit=100)
    counted = Counted(monkeypatch)
    rows = list(opened.rows(RowSet(done)))
    assert [row.row for row in rows] == [row for row in range(index, 100, count) if row not in set(done)]
    assert counted.bytes < 1 << 20


def test_opening_reads_no_more_than_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"prompt": "x" * 1000}).encode() + b"\n"
    fsspec.filesystem("memory").pipe("/big/a.jsonl", line * 40_000)
    counted = Counted(monkeypatch)
    source("memory://big/a.jsonl")
    assert counted.bytes < 13 << 20


def test_num_rows_and_those_of_a_shard(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / "a.parquet", ROWS)), str(write(tmp_path / "b.parquet", ROWS[:1]))]
    assert source(paths).num_rows == 11
    assert source(paths, limit=5).num_rows == 5
    assert source(paths, limit=50).num_rows == 11
    assert [source(paths, index, 3).shard_rows for index in range(3)] == [4, 4, 3]
    assert source(write(tmp_path / "a.jsonl", ROWS), limit=5).shard_rows is None


def test_a_run_that_redoes_rows_reads_only_those(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    rows = source(path).rows(AllBut(RowSet([2, 5, 7]), RowSet([5])))
    assert [row.row for row in rows] == [2, 7]


# Identity


@pytest.mark.parametrize("name", NAMES)
def test_the_fingerprint_changes_with_the_data(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    before = source(path).fingerprint()
    assert json.loads(json.dumps(before)) == before
    write(path, ROWS)
    assert source(path).fingerprint() == before
    write(path, [*ROWS[:9], {**ROWS[9], "number": 8}])
    changed = source(path).fingerprint()
    assert changed != before
    write(path, ROWS[:9])
    assert source(path).fingerprint() not in (before, changed)
    other = write(tmp_path / f"z{name}", ROWS)
    assert source([str(path), str(other)]).fingerprint() != source([str(other), str(path)]).fingerprint()


def test_the_output_may_not_lie_in_the_input(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    for data in (tmp_path, f"file://{tmp_path}", [str(path), str(tmp_path)]):
        with pytest.raises(BatchmixError, match=r"output.dir=.* lies in data.path="):
            check_apart(DataConfig(data), str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    part = write(tmp_path / "out" / "part-00000-000000.jsonl", ROWS)
    for read in (part, part.parent / "*.jsonl", tmp_path / "*" / "*.jsonl", tmp_path / "**"):
        with pytest.raises(BatchmixError, match=r"output.dir=.* lies in data.path="):
            check_apart(DataConfig(str(read)), str(tmp_path / "out"), part.name)
    for read in (path, tmp_path / "*", tmp_path / "*.jsonl", tmp_path / "out" / "*.parquet", "memory://*"):
        check_apart(DataConfig(str(read)), str(tmp_path / "out"), part.name)
    check_apart(DataConfig(str(tmp_path / "out")), str(tmp_path))
    for read in ("s3://b/a", "s3://b/a/", "s3://b/*/out/*.arrow", "s3://b/a/**"):
        with pytest.raises(BatchmixError, match=r"output.dir=s3://b/a/out lies in data.path="):
            check_apart(DataConfig(read), "s3://b/a/out")
    for read in (str(path), "s3://b/a/*.arrow", "s3://b/a/o", "s3://c/a", "s3://b/a/out/*.parquet"):
        check_apart(DataConfig(read), "s3://b/a/out")


# What a user gets wrong


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], "data.path=[]: give at least one file, folder, glob, URL or data set"),
        (None, "data.path=None: must be a file, folder, glob, URL or data set, or a list of them"),
        (5, "data.path=5: must be a file"),
        ([""], "data.path=['']: must be a file"),
        ("/nowhere/a.jsonl", "data.path=/nowhere/a.jsonl: no such file or folder"),
        ("/nowhere/*.jsonl", "data.path=/nowhere/*.jsonl: no data files there"),
        ("memory://nowhere", "data.path=memory://nowhere: no such file or folder"),
        ("nosuch://x", "data.path=nosuch://x: cannot be read (Protocol not known: nosuch"),
        (["a.jsonl", "some/name"], "data.path=a.jsonl: no such file or folder"),
    ],
)
def test_a_path_that_is_nothing(path: Any, message: str) -> None:
    with pytest.raises(BatchmixError) as caught:
        open_source(DataConfig(path), ShardConfig())
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert error_of(tmp_path / "empty") == f"data.path={tmp_path}/empty: no data files there"
    (tmp_path / "a.dat").write_text("prompt\nx\n")
    expected = f"{tmp_path}/a.dat: its name does not say what it is; set data.format"
    assert error_of(tmp_path / "a.dat").startswith(expected)
    assert error_of(tmp_path).startswith(expected)
    assert len(rows_of(tmp_path / "a.dat", format=DataFormat.csv)) == 1
    (tmp_path / "b.jsonl").write_bytes(b"PAR1....")
    assert error_of(tmp_path / "b.jsonl", format=DataFormat.jsonl).startswith(
        f"{tmp_path}/b.jsonl: is not jsonl but parquet"
    )
    (tmp_path / "b.jsonl").write_text('{\n"prompt": 1\n}\n')
    assert error_of(tmp_path / "b.jsonl") == (
        f"{tmp_path}/b.jsonl, row 1: the line is no JSON: Expecting property name enclosed in double quotes"
        " at character 2; nor can another of the first 3 rows be read"
    )


def test_a_file_that_is_cut_off_or_vanishes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_files, "_SAMPLE_ROWS", 10)
    monkeypatch.setattr(text_readers, "_BLOCK_BYTES", 1000)
    path = tmp_path / "a.jsonl.gz"
    lines = b"".join(json.dumps({"prompt": os.urandom(20).hex()}).encode() + b"\n" for _ in range(5000))
    path.write_bytes(gzip.compress(lines)[:-5000])
    rows = source(path).rows(RowSet())
    with pytest.raises(BatchmixError, match=r"a.jsonl.gz: cannot be read past row \d+ \(Compressed file ended"):
        list(rows)
    opened = source(write(tmp_path / "b.jsonl", ROWS))
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(BatchmixError, match=r"b.jsonl: cannot be read"):
        list(opened.rows(RowSet()))


# Hub data sets


def hub(path: Path, split: str = "train", index: int = 0, count: int = 1, **data: Any) -> Source:
    return Source(DataConfig(str(path), **data), ShardConfig(index, count), HubInput(str(path), split))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_data_set_through_datasets(tmp_path: Path, name: str) -> None:
    rows = [{**row, "prompt": "x" * number} for number, row in enumerate(ROWS * 150)]
    write(tmp_path / name, rows)
    opened = hub(tmp_path)
    assert opened.schema == SCHEMA
    assert [row.columns for row in opened.rows(RowSet())] == rows
    some = hub(tmp_path, index=1, count=2, columns=["number"], limit=1200)
    assert [row.row for row in some.rows(RowSet([5]))] == [row for row in range(1, 1200, 2) if row != 5]
    assert next(some.rows(RowSet())).columns == {"number": 1, "prompt": "x"}
    before = opened.fingerprint()
    assert json.loads(json.dumps(before)) == before
    write(tmp_path / name, rows[1:])
    assert hub(tmp_path).fingerprint() != before


def test_a_data_set_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(BatchmixError, match=r"data.split=nope \(") as caught:
        hub(tmp_path, "nope")
    assert "\n" not in str(caught.value)
    message = error_of("nobody-at-all/nothing")
    assert message.startswith("data.path=nobody-at-all/nothing: no file or folder here, and no hub data set")
    with pytest.raises(BatchmixError, match="no column 'x'"):
        hub(tmp_path, columns=["x"])


def test_a_signal_while_a_file_is_read_is_no_error_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    monkeypatch.setattr(pq, "read_schema", lambda _: signal.raise_signal(signal.SIGTERM))
    with StopSignals(), pytest.raises(Interrupted, match="SIGTERM"):
        source(path)


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffHello\r\n\n  two words \r\n[1]".encode())
    assert [row.columns for row in rows_of(tmp_path / "a.txt")] == [
        {"prompt": "Hello"}, {"prompt": "  two words "}, {"prompt": "[1]"},
    ]  # fmt: skip
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"\xff\nthree"))
    rows = rows_of(tmp_path / "b.txt.gz")
    assert "is no UTF-8" in str(rows[0].error)
    assert rows[1].columns == {"prompt": "three"}
    assert [row.row for row in rows_of(tmp_path, 1, 2)] == [1, 3]


def test_a_text_file_beside_data_is_none_and_json_lines_in_one_are_json(tmp_path: Path) -> None:
    jsonl(tmp_path, {"prompt": "a"})
    (tmp_path / "README.txt").write_text("Read me")
    assert [row.columns for row in rows_of(tmp_path)] == [{"prompt": "a"}]
    lines = tmp_path / "lines.txt"
    lines.write_text('{"prompt": "b"}\n')
    assert [row.columns for row in rows_of(lines)] == [{"prompt": "b"}]
    assert [row.columns for row in rows_of(lines, format=DataFormat.text)] == [{"prompt": '{"prompt": "b"}'}]


def test_a_field_of_a_column_may_be_named(tmp_path: Path) -> None:
    row = {"meta": {"text": "Hi", "id": 7}, "a.b": 1}
    path = jsonl(tmp_path, row)
    named = {"prompt_column": "meta.text", "id_column": "meta.id"}
    assert [(row.id, row.columns) for row in rows_of(path, **named)] == [("7", row)]
    assert rows_of(path, columns=["a.b"], prompt_column="meta.text")[0].columns["meta"] == row["meta"], "it is read"
    assert "no column 'txt' (data.prompt_column=meta.txt); it has text, id; did you mean 'text'?" in error_of(
        path, prompt_column="meta.txt"
    )
    assert "no column 'mta.text'" in error_of(path, prompt_column="mta.text")


def test_conversations_are_named_where_nothing_else_is_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"conversations": [{"from": "human", "value": "Hi"}]})
    assert error_of(path).endswith("of ShareGPT's conversations: data.messages_column=conversations")
