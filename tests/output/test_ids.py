"""The output's `id`: from a column that is called as ids usually are, or named by data.id_column, else the ordinal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from batchmix.annotate.prompts import RowPrompts
from batchmix.annotate.results import Results
from batchmix.config import Config
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig, ShardConfig
from batchmix.input.rowset import RowSet
from batchmix.input.source import open_source
from batchmix.output.config import OutputConfig
from batchmix.pipeline import generate
from batchmix.sampling import SamplingConfig
from batchmix.storage.bookkeeping import RUN

PROMPTS = [f"Write about number {i}" for i in range(6)]
NAMES = [f"r-{i}" for i in range(6)]


def write(path: Path, **columns: Sequence[Any]) -> Path:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(data: Path, out: Path, n: int = 1, overwrite: bool = False, **settings: Any) -> list[dict[str, Any]]:
    """The rows of a sampled run, in order."""
    generate(Config(
        data=DataConfig(path=str(data), **settings),
        sampling=SamplingConfig(max_tokens=6, temperature=4.0, seed=11, n=n),
        engine=EngineConfig(device="cpu"),
        output=OutputConfig(dir=str(out), rows_per_shard=2, overwrite=overwrite),
    ))  # fmt: skip
    return read(out)


def read(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ds.dataset(out, format="arrow").to_table().to_pylist()
    return sorted(found, key=lambda row: (row["row"], row["sample_index"]))


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["generated_text"] for row in rows]


def test_a_column_id_is_the_outputs_and_changes_no_answer(tmp_path: Path) -> None:
    plain = run(write(tmp_path / "plain.jsonl", prompt=PROMPTS), tmp_path / "plain", n=2)
    data = write(tmp_path / "ids.jsonl", id=NAMES, prompt=PROMPTS)
    found = run(data, tmp_path / "ids", n=2)
    assert [row["id"] for row in found[::2]] == NAMES
    assert [row["id"] for row in plain[::2]] == [str(i) for i in range(6)]
    assert found[0].keys() == plain[0].keys()
    assert texts(found) == texts(plain), "random numbers are keyed by the row's number"
    named = run(data, tmp_path / "named", n=2, id_column="id")
    assert [row["id"] for row in named[::2]] == NAMES
    assert named[0].keys() == plain[0].keys()
    assert texts(named) != texts(plain), "and by data.id_column where it is given"
    with pytest.raises(BatchmixError, match=r'data\.id_column was null, is now "id"'):
        run(data, tmp_path / "ids", n=2, id_column="id")


@pytest.mark.parametrize("name", ["custom_id", "uuid"])
def test_other_usual_names_fill_it_and_stay_columns(tmp_path: Path, name: str) -> None:
    data = write(tmp_path / "ids.jsonl", prompt=PROMPTS[:2], **{name: NAMES[:2]})
    found = run(data, tmp_path / "out")
    assert [(row["id"], row[name]) for row in found] == [(id, id) for id in NAMES[:2]]


def test_a_column_id_that_does_not_fill_it_is_kept(tmp_path: Path) -> None:
    data = write(tmp_path / "ids.jsonl", prompt=PROMPTS[:2], id=NAMES[:2], other=["x", "y"])
    found = run(data, tmp_path / "out", id_column="other")
    assert [(row["id"], row["input_id"], row["other"]) for row in found] == [("x", "r-0", "x"), ("y", "r-1", "y")]


IDS: list[tuple[list[Any], list[str], str | None]] = [
    (["a", None, "c"], ["a", "1", "c"], "id"),
    ([7, 8, 9], ["7", "8", "9"], "id"),
    ([1.5, 2.5, 3.5], ["0", "1", "2"], None),
    ([True, False, True], ["0", "1", "2"], None),
    (["a", 2, None], ["0", "1", "2"], None),  # kept as JSON text
    ([["a"], ["b"], []], ["0", "1", "2"], None),
    ([None, None, None], ["0", "1", "2"], None),
]


@pytest.mark.parametrize(("ids", "expected", "column"), IDS, ids=str)
def test_texts_and_integers_are_ids(tmp_path: Path, ids: list[Any], expected: list[str], column: str | None) -> None:
    path = write(tmp_path / "ids.jsonl", id=ids, prompt=PROMPTS[:3])
    for columns in (None, ["prompt"]):  # also where the output keeps no other column
        source = open_source(DataConfig(path=str(path), columns=columns), ShardConfig())
        rows = list(source.rows(RowSet()))
        assert (source.id_column, [row.id for row in rows]) == (column, expected)
        assert [row.error for row in rows] == [None] * 3
        assert [row.key for row in rows] == ([None] * 3 if column is None else ["0", "1", "2"])


def test_the_first_usual_name_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "ids.jsonl", uuid=["u"], custom_id=["c"], prompt=PROMPTS[:1])
    assert open_source(DataConfig(path=str(path)), ShardConfig()).id_column == "custom_id"


def test_a_template_that_shows_the_id_is_shown_with_it(tmp_path: Path) -> None:
    data = write(tmp_path / "ids.jsonl", id=[7, 8], text=["x", "y"])
    run(data, tmp_path / "out", template="{{ id }}: {{ text }}")
    results = Results(str(tmp_path / "out"))
    assert [RowPrompts(results).of(row) for row in results.rows()] == ["7: x", "8: y"]


@pytest.mark.parametrize("id_column", [None, "id"])
def test_a_run_of_an_earlier_release_keeps_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id_column: str | None
) -> None:
    data, out = write(tmp_path / "ids.jsonl", id=NAMES, prompt=PROMPTS), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("batchmix.preflight.columns_of", lambda storage: 1)  # as those releases did
        whole = run(data, out, id_column=id_column)
    assert [(row["id"], row["input_id"]) for row in whole] == [
        (name if id_column else str(i), name) for i, name in enumerate(NAMES)
    ]
    assert {"columns", "id_column"}.isdisjoint(json.loads((out / RUN).read_text())["identity"])
    for part in sorted(out.glob("part-*"))[1:]:
        part.unlink()
    for done in out.glob(".batchmix/[Sd][Uo]*"):  # SUCCESS, done-*
        done.unlink()
    assert len(read(out)) == 2
    assert run(data, out, id_column=id_column) == whole
    assert [row["id"] for row in run(data, out, overwrite=True, id_column=id_column)] == NAMES
    assert "input_id" not in read(out)[0]
