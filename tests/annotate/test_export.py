"""Handing over: files in each format, the card, the hub (a stand-in), and people's corrections merged in."""

from __future__ import annotations

import csv
import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from finished_runs import finished
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.annotate.arrow_types import Field
from batchmix.annotate.card import card
from batchmix.annotate.checks import write_checks
from batchmix.annotate.columns import annotation_columns
from batchmix.annotate.config import AnnotateConfig, ExportConfig, ExportFormat
from batchmix.annotate.corrections import Correction, read_corrections, write_corrections
from batchmix.annotate.export import _as_texts, export
from batchmix.annotate.results import Results
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.output.columns import OutputColumns
from batchmix.output.config import OutputConfig, OutputFormat

SCHEMA = {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}, "tags": {"type": "array", "items": {"type": "string"}},
                                           "n": {"type": "integer"}, "extra": {}}}  # fmt: skip
TASK = AnnotateConfig(input="{{ text }}", json_schema=SCHEMA)


def answer(mood: str, *tags: str, n: int = 1) -> str:
    return json.dumps({"mood": mood, "tags": tags, "n": n, "extra": {"a": 1}})


def run(folder: Path, form: OutputFormat = OutputFormat.arrow) -> Results:
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"text": "first, \"quoted\"\nline", "day": "2024-01-0" + str(i + 1)}, [answer("good", "x", "y"), answer("bad")]) for i in range(3)
    ]  # fmt: skip
    rows.append(({"text": "|pipe| ü", "day": None}, ["nonsense", answer("bad", n=7)]))
    rows.append(({"text": "", "day": None}, [None, None]))
    return finished(folder, TASK, rows, form=form, template="Judge ```this```: {{ text }}")


def do(folder: Path, **settings: Any) -> Path:
    export(
        Config(output=OutputConfig(dir=str(folder / "run")), export=ExportConfig(dir=str(folder / "set"), **settings))
    )
    return folder / "set"


@pytest.mark.parametrize("form", list(OutputFormat))
def test_one_typed_record_a_row_in_parquet_from_every_format(form: OutputFormat, tmp_path: Path) -> None:
    run(tmp_path / "run", form)
    files = sorted((do(tmp_path, rows_per_file=2) / "data").iterdir())
    assert [path.name for path in files] == [f"train-{i:05}.parquet" for i in range(3)]
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert [(row["row"], row["mood"], row["tags"], row["n"]) for row in rows] == [
        (0, "good", ["x", "y"], 1), (1, "good", ["x", "y"], 1), (2, "good", ["x", "y"], 1), (3, "bad", [], 7), (4, None, None, None),
    ]  # fmt: skip
    assert rows[3]["agreement"] == 1.0
    assert rows[0]["extra"] == '{"a": 1}'
    assert rows[4]["error"] == "no prompt"
    assert not {"majority", "sample_index"} & rows[0].keys()


FORMULAS = ["=1+1", "+1", "-2.5", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=cmd|' /C calc'!A0"]
HARMLESS = ["a=b", " =1", "'=1", "1-1", "", "[-1]"]


def test_texts_that_a_spreadsheet_would_run_are_guarded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = FORMULAS + HARMLESS
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"=head": text, "number": -1.5 - i, "whole": -i, "list": ["=1", text]}, [answer("good")])
        for i, text in enumerate(texts)
    ]
    finished(tmp_path / "run", TASK, rows)

    def cells(**settings: Any) -> list[dict[str, str]]:
        path = do(tmp_path, format=ExportFormat.csv, **settings) / "data/train-00000.csv"
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    written = cells()
    said = capsys.readouterr().out
    assert f"{len(FORMULAS) + 1} cells that spreadsheets would run as formulas begin with ' now" in said
    assert [row["'=head"] for row in written] == [f"'{text}" for text in FORMULAS] + HARMLESS
    assert [float(row["number"]) for row in written] == [-1.5 - i for i in range(len(texts))]
    assert [int(row["whole"]) for row in written] == [-i for i in range(len(texts))]
    assert [json.loads(row["list"])[1] for row in written] == texts

    plain = cells(guard_formulas=False)
    assert [row["=head"] for row in plain] == texts
    assert "formulas" not in capsys.readouterr().out
    other = do(tmp_path, format=ExportFormat.jsonl) / "data/train-00000.jsonl"
    assert [json.loads(line)["=head"] for line in other.read_text().splitlines()] == texts


@settings(deadline=None, max_examples=50)
@given(st.lists(st.none() | st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(FORMULAS), min_size=1))
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_guarding_changes_nothing_else(kind: pa.DataType, texts: list[str | None]) -> None:
    values = [text.encode() if text is not None and kind == pa.binary() else text for text in texts]
    table, guarded = _as_texts(
        pa.table({"x": pa.array(values, pa.binary() if kind == pa.binary() else pa.string()).cast(kind)}), True
    )
    found = [value.decode() if isinstance(value, bytes) else value for value in table["x"].to_pylist()]
    assert not [text for text in found if text is not None and text[:1] in tuple("=+-@\t\r\n")]
    assert [old if old == new else f"'{old}" for old, new in zip(texts, found, strict=True)] == found
    assert guarded == sum(old != new for old, new in zip(texts, found, strict=True))


def test_lines_of_json_and_csv_say_the_same(tmp_path: Path) -> None:
    run(tmp_path / "run")
    lines = [json.loads(line) for line in (do(tmp_path, format=ExportFormat.jsonl) / "data/train-00000.jsonl").open()]
    folder = do(tmp_path, format=ExportFormat.csv)
    assert [path.name for path in (folder / "data").iterdir()] == ["train-00000.csv"], "the earlier export is gone"
    with (folder / "data/train-00000.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == len(lines) == 5
    for line, row in zip(lines, cells, strict=True):
        assert row["text"] == line["text"]
        assert row["mood"] == (line["mood"] or "")
        assert (json.loads(row["tags"]) if row["tags"] else None) == line["tags"]


def test_all_samples(tmp_path: Path) -> None:
    run(tmp_path / "run")
    rows = pq.read_table(do(tmp_path, samples=True) / "data/train-00000.parquet").to_pylist()
    assert len(rows) == 10
    assert sum(row["majority"] for row in rows) == 5


def test_what_has_no_json_becomes_text() -> None:
    from batchmix.annotate.export import _json_value

    found = [_json_value(value) for value in (b"\xff", datetime.date(2024, 1, 2), datetime.timedelta(days=1))]
    assert found == ["/w==", "2024-01-02", "1 day, 0:00:00"]


def test_the_card_says_how_the_data_came_to_be(tmp_path: Path) -> None:
    write_checks(run(tmp_path / "run"), None, 50)
    text = (do(tmp_path, license="cc-by-4.0", title="Moods | of *all* kinds") / "README.md").read_text()
    head, _, body = text.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head) == {
        "license": "cc-by-4.0", "pretty_name": "Moods | of *all* kinds", "tags": ["synthetic", "batchmix"], "size_categories": ["n<1K"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    }  # fmt: skip
    for piece in ("- records: 5\n", "(`error`): 1\n", "(`invalid`): 0\n", "| mood | label | the answer: good, bad |", "| n | int64 | the answer |",
                  "````\nJudge ```this```: {{ text }}\n````", '"seed": 0', "labels: 4 of 5 rows", "Licence of this data set: cc-by-4.0."):  # fmt: skip
        assert piece in body, piece


def test_a_card_without_a_licence_says_so(tmp_path: Path) -> None:
    finished(tmp_path / "run", AnnotateConfig(), [({"prompt": "a"}, ["b"])])
    text = (do(tmp_path) / "README.md").read_text()
    assert "license: unknown\n" in text
    assert "nobody has stated it: `export.license`" in text


def test_the_card_explains_every_column_of_batchmix(tmp_path: Path) -> None:
    results = run(tmp_path / "run")
    every = OutputColumns(pa.schema([("text", pa.string())]), token_ids=False, logprobs=False, choice_probabilities=True,
                          guided_logprobs=True, annotations=annotation_columns(TASK)).schema  # fmt: skip
    text = card(results, ExportConfig(), Counter(rows=1), every)
    assert [line for line in text.splitlines() if line.endswith("| from the source data |")] == [
        "| text | string | from the source data |"
    ]
    assert "| the model's probability of each choice, in the order of the choices |" in text


def test_the_folder_loads_as_the_hub_would_load_it(tmp_path: Path) -> None:
    import datasets

    run(tmp_path / "run")
    loaded = datasets.load_dataset(str(do(tmp_path, rows_per_file=2)), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["mood"][:4] == ["good", "good", "good", "bad"]


class Hub:
    """In place of the network: what `datasets` and huggingface_hub are asked to upload, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets
        import huggingface_hub

        self.asked: list[tuple[Any, ...]] = []

        def push_to_hub(dataset: datasets.Dataset, repo_id: str, *, private: bool) -> None:
            self.asked.append((repo_id, private, dataset.to_list()))

        monkeypatch.setattr(datasets.Dataset, "push_to_hub", push_to_hub)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, repo_type: str) -> None:
        self.asked.append((repo_id, repo_type, path_in_repo, path_or_fileobj))


def test_pushing_uploads_the_data_and_then_our_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hub = Hub(monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    run(tmp_path / "run")
    folder = do(tmp_path, repo_id="me/moods", rows_per_file=2)
    (repo, private, rows), card = hub.asked
    assert (repo, private) == ("me/moods", True)
    assert [row["mood"] for row in rows] == ["good", "good", "good", "bad", None]
    assert card == ("me/moods", "dataset", "README.md", (folder / "README.md").read_bytes())


def test_corrections_take_the_models_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run")
    whole = {"mood": "bad", "tags": ["z"], "n": 5, "extra": [1]}
    lines = [{"row": 0, "values": {"mood": "bad"}}, {"row": 3, "values": whole}, {"row": 99, "values": {}}]
    (tmp_path / "corrections.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = do(tmp_path, corrections=str(tmp_path / "corrections.jsonl"))
    assert "1 of the corrections are of rows that this run does not have" in capsys.readouterr().out
    rows = pq.read_table(folder / "data/train-00000.parquet").to_pylist()
    assert [row["reviewed"] for row in rows] == [True, False, False, True, False]
    assert [row["mood"] for row in rows] == ["bad", "good", "good", "bad", None]
    assert rows[0]["tags"] == ["x", "y"]
    assert (rows[3]["tags"], rows[3]["n"], rows[3]["extra"], rows[1]["extra"]) == (["z"], 5, "[1]", '{"a": 1}')
    assert "- checked by people (`reviewed`): 2" in (folder / "README.md").read_text()


def test_corrections_of_another_row_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "run")
    path = tmp_path / "corrections.jsonl"
    path.write_text('{"row": 1, "id": "r2", "values": {"mood": "bad"}}\n')
    with pytest.raises(
        BatchmixError, match=r"export\.corrections=.*: 1 of 1 rows .* \(row 1 is 'r2' there and 'r1' in the run\)"
    ):
        do(tmp_path, corrections=str(path))
    assert not (tmp_path / "set").exists()
    path.write_text('{"row": 1, "id": "r1", "values": {"mood": "bad"}}\n')
    rows = pq.read_table(do(tmp_path, corrections=str(path)) / "data/train-00000.parquet").to_pylist()
    assert [row["mood"] for row in rows][1] == "bad"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo_id": "me/x", "format": ExportFormat.csv}, "export.format=csv: the hub takes parquet"),
        ({"corrections": "nowhere"}, "export.corrections=nowhere: cannot be read"),
        ({"corrections": "bad.jsonl", "samples": True}, "export.samples=true"),
        ({"corrections": "bad.jsonl"}, "line 1: mood='worse' must be one of good, bad"),
        ({"corrections": "odd.jsonl"}, "line 1: colour is no field of the answers; those are mood, tags, n, extra"),
        ({"corrections": "no.jsonl"}, "line 1: must be {"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"row": 1, "values": {"mood": "worse"}}\n')
    Path("odd.jsonl").write_text('{"row": 1, "values": {"colour": "red"}}\n')
    Path("no.jsonl").write_text("[1]\n")
    run(tmp_path / "run")
    with pytest.raises(BatchmixError) as caught:
        do(tmp_path, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["run", "./x/../run/"])
def test_a_data_set_has_a_folder_of_its_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run")
    with pytest.raises(BatchmixError, match=r"is output[.]dir, whose parts could not be read"):
        export(Config(output=OutputConfig(dir=str(tmp_path / "run")), export=ExportConfig(dir=name)))
    assert not (tmp_path / "run/data").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("README.md", "README.md"),
        ("notes.txt", "notes.txt"),
        ("data/rows.csv", "data/rows.csv"),
        ("data/train-00001.parquet", "data/train-00001.parquet"),
    ],
)
def test_a_folder_with_files_of_people_is_refused(tmp_path: Path, name: str, said: str) -> None:
    run(tmp_path / "run")
    (tmp_path / "set/data").mkdir(parents=True)
    (tmp_path / "set" / name).write_text("mine")
    with pytest.raises(BatchmixError, match=f"set: holds {said}, which batchmix export did not write"):
        do(tmp_path)
    assert [path.name for path in (tmp_path / "set").rglob("*") if path.is_file()] == [Path(name).name]
    assert (tmp_path / "set" / name).read_text() == "mine"


def test_an_export_that_was_killed_may_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "run")

    def killed(*_: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("batchmix.annotate.export.card", killed)
        with pytest.raises(KeyboardInterrupt):
            do(tmp_path)
    assert (tmp_path / "set/README.md").read_text() == "Made by batchmix: the export is not finished.\n"
    assert "- records: 5\n" in (do(tmp_path) / "README.md").read_text()


def test_a_run_that_is_not_finished_is_not_handed_over(tmp_path: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "run/.batchmix/SUCCESS").unlink()
    with pytest.raises(BatchmixError, match="the run is not finished"):
        do(tmp_path)


def test_corrections_hold_every_character(tmp_path: Path) -> None:
    path, text = str(tmp_path / "corrections.jsonl"), "one\u2028line\x85\n\U0001f600"
    corrections = {2: Correction("t2", {"note": text}), 1: Correction(None, {"note": "b"})}
    write_corrections(path, corrections)
    assert read_corrections(path, [Field("note", pa.string())]) == corrections
