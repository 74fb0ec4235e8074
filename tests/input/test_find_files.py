from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig, DataFormat, ShardConfig
from batchmix.input.rowset import RowSet
from batchmix.input.source import open_source

LINE = b'{"prompt": "one"}\n'


def prompts(path: object, key: str = "prompt", **data: Any) -> list[Any]:
    return [row[key] for row in columns(path, **data)]


def columns(path: object, **data: Any) -> list[dict[str, Any]]:
    source = open_source(DataConfig(path if isinstance(path, list) else str(path), **data), ShardConfig())
    rows = list(source.rows(RowSet()))
    assert [row.error for row in rows] == [None] * len(rows)
    return [row.columns for row in rows]


def error_of(path: object, **data: Any) -> str:
    with pytest.raises(BatchmixError) as caught:
        open_source(DataConfig(str(path), **data), ShardConfig())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# What of a folder is data


@pytest.mark.parametrize("data", ["data.jsonl", "data.csv", "data.jsonl.gz", "sub/data.jsonl"])
def test_json_beside_data_describes_it(tmp_path: Path, data: str, caplog: pytest.LogCaptureFixture) -> None:
    content = b"prompt\none\n" if data.endswith("csv") else gzip.compress(LINE) if data.endswith("gz") else LINE
    make(tmp_path, {data: content, "metadata.json": b'{"name": "my set"}', "x.json.gz": gzip.compress(b'{"a": 1}')})
    with caplog.at_level(logging.INFO):
        assert prompts(tmp_path) == ["one"]
        assert prompts(f"{tmp_path}/**") == ["one"]
    assert f"left out, since it is no data beside the other files: {tmp_path}/metadata.json" in caplog.text
    if "csv" not in data:
        assert prompts(tmp_path, format=DataFormat.jsonl) == ["one"]


def test_json_alone_is_data(tmp_path: Path) -> None:
    make(tmp_path, {"a.json": LINE, "b.json": LINE, "README.md": b"about"})
    assert prompts(tmp_path) == ["one", "one"]
    make(tmp_path, {"c.jsonl": b'{"prompt": "three"}'})
    assert prompts(f"{tmp_path}/*.json") == ["one", "one"]
    assert prompts(tmp_path / "a.json") == ["one"]
    assert prompts([f"{tmp_path}/a.json", f"{tmp_path}/c.jsonl"]) == ["one", "three"]


def test_what_spark_and_hadoop_write(tmp_path: Path) -> None:
    make(tmp_path, {
        "part-00000-1a.json": LINE, ".part-00000-1a.json.crc": b"crc\x00", "_SUCCESS": b"", "._SUCCESS.crc": b"",
        "_temporary/0/part-1.json": LINE,
    })  # fmt: skip
    for path in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/**", f"{tmp_path}/part-*"):
        assert prompts(path) == ["one"], path
    assert prompts(f"{tmp_path}/_temporary/*/*") == ["one"]
    make(tmp_path / "plain", {"000000_0": LINE, "000001_0": LINE})
    assert prompts(tmp_path / "plain") == ["one", "one"]


def test_a_glob_over_other_files(tmp_path: Path) -> None:
    make(tmp_path, {"a.jsonl": LINE, "README.md": b"about", "LICENSE": b"free"})
    assert prompts(f"{tmp_path}/*") == ["one"]
    assert "README.md: its name does not say what it is" in error_of(f"{tmp_path}/R*")


def test_parquet_by_any_name(tmp_path: Path) -> None:
    frame = pd.DataFrame({"prompt": ["a", "b"]})
    for name in ("x.parquet.gz", "x.parquet.gzip", "x.parquet", "x", "x.json"):
        frame.to_parquet(tmp_path / name, compression="gzip")
        assert prompts(tmp_path / name) == ["a", "b"]
        assert prompts(tmp_path / name, format=DataFormat.parquet) == ["a", "b"]


# Empty files


@pytest.mark.parametrize("empty", [b"", b"\n", b" \r\n\t", gzip.compress(b"", mtime=0), gzip.compress(b"\n", mtime=0)])
def test_empty_files_among_others_are_left_out(tmp_path: Path, empty: bytes, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, {"a.jsonl": LINE, "b.jsonl": empty, "c.jsonl": LINE})
    assert prompts(tmp_path) == ["one", "one"]
    assert caplog.messages == [f"left out, since they are empty: {tmp_path}/b.jsonl"]
    assert prompts([f"{tmp_path}/b.jsonl", f"{tmp_path}/a.jsonl"]) == ["one"]
    assert error_of(tmp_path / "b.jsonl") == f"{tmp_path}/b.jsonl: is empty"
    make(tmp_path / "all", {"a.jsonl": empty, "b.parquet": b""})
    assert error_of(tmp_path / "all") == f"{tmp_path}/all/a.jsonl: is empty, and so are the 1 others"


def test_files_without_rows_among_others(tmp_path: Path) -> None:
    make(tmp_path, {"a.csv": b"prompt\nhi\n", "b.csv": b"prompt\n"})
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "c.parquet")
    assert prompts(tmp_path) == ["hi"]


# Data sets that `datasets` saved


def test_a_saved_data_set(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"prompt": [f"p{number}" for number in range(5)]})
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    assert prompts(tmp_path / "one") == [f"p{number}" for number in range(5)]
    # A data set saved anew in fewer files: the old ones are none of it.
    stale = tmp_path / "one" / "data-00000-of-00009.arrow"
    stale.write_bytes((tmp_path / "one" / "data-00000-of-00002.arrow").read_bytes())
    assert len(prompts(tmp_path / "one")) == 5
    fsspec.filesystem("memory").put(str(tmp_path / "one"), "/saved/one", recursive=True)
    assert len(prompts("memory://saved/one")) == 5


def test_a_saved_data_set_of_several_splits(tmp_path: Path) -> None:
    one, two = (datasets.Dataset.from_dict({"prompt": [text]}) for text in ("a", "b"))
    datasets.DatasetDict(train=one, test=two).save_to_disk(tmp_path / "both")
    assert prompts(tmp_path / "both") == ["a"]
    assert prompts(tmp_path / "both", split="test") == ["b"]
    assert error_of(tmp_path / "both", split="dev") == (
        f"{tmp_path}/both/dataset_dict.json: has no split 'dev'; set data.split to one of train, test"
    )


# Columns in folders' names


@pytest.mark.parametrize("form", ["parquet", "ipc", "csv"])
def test_hive_partitions(tmp_path: Path, form: str) -> None:
    table = pa.table({"prompt": ["a", "b", "c"], "lang": ["de", "fr/x=1", None], "year": [2023, 2024, 2025]})
    ds.write_dataset(table, tmp_path, format=form, partitioning=["lang", "year"], partitioning_flavor="hive")
    if form == "ipc":
        for path in tmp_path.rglob("*.ipc"):
            path.rename(path.with_suffix(".arrow"))
    found = columns(tmp_path, template="{{ lang }}{{ year }}: {{ prompt }}")
    expected = sorted(table.to_pylist(), key=lambda row: row["prompt"])
    assert sorted(found, key=lambda row: row["prompt"]) == expected
    globbed = columns(f"{tmp_path}/lang=*/*/*.{'arrow' if form == 'ipc' else form}")
    assert sorted(globbed, key=lambda row: row["prompt"]) == expected
    below = columns(next(tmp_path.glob("lang=de")))
    assert below == [{"prompt": "a", "year": 2023}], "what the user names is no column"


def test_hive_partitions_are_typed_and_kept(tmp_path: Path) -> None:
    make(tmp_path, {"n=01/a.jsonl": LINE, "n=2/a.jsonl": b'{"prompt": "two", "n": 7}\n', "b.jsonl": LINE})
    source = open_source(DataConfig(str(tmp_path), columns=["n"]), ShardConfig())
    assert source.schema == pa.schema([("n", pa.string())]), "01 would not come out as it is written"
    assert [(row.columns.get("n"), row.error) for row in source.rows(RowSet())] == [
        (None, None),
        ("01", None),
        ("2", None),
    ]
    before = source.fingerprint()
    (tmp_path / "n=2").rename(tmp_path / "n=3")
    assert open_source(DataConfig(str(tmp_path)), ShardConfig()).fingerprint() != before
    assert json.loads(json.dumps(before)) == before


# CSV


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.tsv.gz"])
def test_delimiters(tmp_path: Path, name: str) -> None:
    mark, pack = ("," if name == "a.csv" else "\t"), (gzip.compress if name.endswith("gz") else bytes)
    make(tmp_path, {name: pack(f'prompt{mark}lang\n"a{mark}b"{mark}de\n'.encode())})
    assert columns(tmp_path) == [{"prompt": f"a{mark}b", "lang": "de"}]
    make(tmp_path, {name: pack(b"prompt;lang\na,b;de\n")})
    assert columns(tmp_path, csv_delimiter=";") == [{"prompt": "a,b", "lang": "de"}]
    make(tmp_path, {name: pack(b"prompt;lang\na;de\n")})
    assert error_of(tmp_path).endswith("its columns are prompt;lang; is it separated otherwise? data.csv_delimiter=';'")
    named = error_of(tmp_path, template="{{ lang }}")
    assert named.endswith(
        "no column 'lang' (data.template); it has prompt;lang; is it separated otherwise? data.csv_delimiter=';'"
    )
    make(tmp_path, {"b.csv": b"prompt\tlang\na\tde\n"})
    for tab in ("\t", "\\t"):
        assert columns(tmp_path / "b.csv", csv_delimiter=tab) == [{"prompt": "a", "lang": "de"}]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-16-le", "utf-8", "utf-8-sig"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    make(tmp_path, {"a.csv": "prompt,é\nüber,1\n".encode(encoding)})
    assert columns(tmp_path, csv_encoding=encoding) == [{"prompt": "über", "é": 1}]
    if encoding in ("cp1252", "latin-1"):
        assert error_of(tmp_path) == f"{tmp_path}/a.csv: the name of column 2 is no UTF-8; set data.csv_encoding"


def test_bytes_that_are_not_of_the_encoding(tmp_path: Path) -> None:
    path = make(tmp_path, {"a.csv": b"prompt\n\x81\na\n"}) / "a.csv"
    rows = list(open_source(DataConfig(str(path), csv_encoding="cp1252"), ShardConfig()).rows(RowSet()))
    assert rows[0].error == f"{path}, row 1: the row is no cp1252"
    assert rows[1].columns == {"prompt": "a"}


# The prompt's columns

BOTH = {"prompt": "What?", "messages": [{"role": "user", "content": "Who?"}], "prompt_token_ids": [1]}


@pytest.mark.parametrize("key", ["messages_column", "prompt_column", "token_ids_column"])
def test_a_named_column_that_is_missing_is_an_error(tmp_path: Path, key: str) -> None:
    path = make(tmp_path, {"a.jsonl": json.dumps(BOTH).encode()}) / "a.jsonl"
    assert error_of(path, **{key: "nosuch"}).startswith(f"{path}: no column 'nosuch' (data.{key}); it has prompt,")
    assert open_source(DataConfig(str(path), **{key: "prompt"}), ShardConfig())


def test_a_template_and_a_named_column_contradict_each_other(tmp_path: Path) -> None:
    make(tmp_path, {"a.jsonl": json.dumps(BOTH).encode()})
    assert error_of(tmp_path, template="{{ prompt }}", prompt_column="prompt").startswith("data.template says what")
    assert open_source(DataConfig(str(tmp_path), template="x", token_ids_column="prompt_token_ids"), ShardConfig())
