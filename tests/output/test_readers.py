"""What a run leaves is read as it is by the libraries that people read data sets with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas
import polars
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

import batchmix
from batchmix.annotate.page import report
from batchmix.config import Config
from batchmix.output.config import OutputConfig
from batchmix.output.lease import Record
from batchmix.output.owner import Owner
from batchmix.output.stored_run import open_stored

ROWS = 3
Reader = Callable[[Path], Any]


@pytest.fixture(scope="module", params=["arrow", "parquet", "jsonl"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A format, and a folder with all that a run may leave: a trace, a report, Hydra's files, and the seal of a worker."""
    form, folder = request.param, tmp_path_factory.mktemp(request.param)
    data, out = folder / "rows.jsonl", folder / "out"
    rows = [{"messages": [{"role": "user", "content": f"Ticket {i}"}], "tags": ["a", "b"]} for i in range(ROWS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batchmix.run("generate", {
        "data.path": str(data), "output.dir": str(out), "output.format": form, "output.rows_per_shard": 2,
        "output.token_ids": True, "sampling.max_tokens": 3, "sampling.logprobs": 2, "engine.trace": True, "engine.device": "cpu",
    })  # fmt: skip
    report(Config(output=OutputConfig(dir=str(out))))
    parts, _ = open_stored(str(out))
    silent = Record(
        "00000-of-00001", 1, Owner("another", 7, 0.0, "boot"), indices=[0], first_number=parts.next_number()
    )
    parts.seal(silent)
    assert len(parts.names()) == 3
    assert {path.name for path in out.iterdir() if not path.name.startswith("part-")} == {".batchmix", ".hydra"}
    return form, out


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


READERS: dict[str, dict[str, Reader]] = {
    "arrow": {
        "datasets": lambda out: datasets.load_dataset(str(out), split="train").data.table,
        "datasets, its builder": lambda out: datasets.load_dataset("arrow", data_dir=str(out), split="train").data.table,
        "pyarrow": lambda out: ds.dataset(out, format="arrow").to_table(),
        "polars": lambda out: polars.read_ipc(out / "*.arrow").to_arrow(),
        "polars, lazy": lambda out: polars.scan_ipc(out / "*.arrow").collect().to_arrow(),
    },
    "parquet": {
        "datasets": lambda out: datasets.load_dataset(str(out), split="train").data.table,
        "datasets, its builder": lambda out: datasets.load_dataset("parquet", data_dir=str(out), split="train").data.table,
        "pyarrow": lambda out: ds.dataset(out).to_table(),
        "pandas": lambda out: pa.Table.from_pandas(pandas.read_parquet(out)),
        "polars": lambda out: polars.read_parquet(out / "*.parquet").to_arrow(),
        "duckdb": lambda out: duckdb.sql(f"from read_parquet('{out}/*.parquet')").arrow().read_all(),
    },
    "jsonl": {
        "datasets": lambda out: datasets.load_dataset(str(out), split="train").data.table,
        "datasets, its builder": lambda out: datasets.load_dataset("json", data_dir=str(out), split="train").data.table,
        "polars": lambda out: polars.scan_ndjson(out / "*.jsonl").collect().to_arrow(),
        "duckdb": lambda out: duckdb.sql(f"from read_json('{out}/*.jsonl')").arrow().read_all(),
    },
}  # fmt: skip


def test_every_reader_reads_the_folder_as_it_is(run: tuple[str, Path]) -> None:
    form, out = run
    wanted = batchmix.Run(str(out)).table().to_pylist()
    assert [row["row"] for row in wanted] == list(range(ROWS))
    for name, read in READERS[form].items():
        found = read(out).to_pylist()
        found.sort(key=lambda row: row["row"])
        assert [row.keys() for row in found] == [row.keys() for row in wanted], name
        for row, other in zip(found, wanted, strict=True):
            assert {column for column in row if row[column] != other[column]} == set(), name
