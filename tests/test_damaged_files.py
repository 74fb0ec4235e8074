"""What is damaged, hostile or taken away under a run is one line that names it, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slow_cases import slow_after

from batchmix.annotate.panels import _metrics
from batchmix.annotate.task import _read
from batchmix.config import Config
from batchmix.config_files import check_config_files, load_yaml
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.input.source import Source
from batchmix.jobs.annotate import main as annotate_job
from batchmix.jobs.generate import main as generate_job
from batchmix.output.config import OutputConfig
from batchmix.output.exchange import unfinished_exchange
from batchmix.output.finalize import read_runs
from batchmix.output.run_info import read_run
from batchmix.output.stored_run import open_stored
from batchmix.pipeline import generate
from batchmix.records import InputRow
from batchmix.sampling import SamplingConfig
from batchmix.storage import LocalFolder

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


def job(tmp_path: Path) -> Config:
    return Config(
        data=DataConfig(path=str(tmp_path / "in.jsonl")),
        sampling=SamplingConfig(max_tokens=2, temperature=0.0),
        engine=EngineConfig(device="cpu"),
        output=OutputConfig(dir=str(tmp_path / "out"), rows_per_shard=2),
    )


def test_an_output_folder_that_is_deleted_under_a_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(8)))
    read = Source.rows

    def rows(self: Source, done: Any) -> Iterator[InputRow]:
        for row in read(self, done):
            if row.row == 5:
                shutil.rmtree(tmp_path / "out")
            yield row

    monkeypatch.setattr(Source, "rows", rows)
    with pytest.raises(
        BatchmixError, match=f"output.dir={tmp_path}/out: was deleted while the run wrote to it; .* again"
    ):
        generate(job(tmp_path))


RUN = {
    "identity": {}, "redone": [], "openai_model": None,
    "config": {"output": {"format": "arrow", "compression": None, "order": "completion", "rows_per_shard": 5}},
}  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, "\xff", '{"identity": []}', '{"identity": 3, "redone": []}']
)
def test_a_damaged_run_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / ".batchmix").mkdir()
    (tmp_path / ".batchmix/run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        BatchmixError, match=r"\.batchmix/run.json: cannot be read \(.*\); it is damaged or not a file of batchmix"
    ):
        read_run(LocalFolder(tmp_path))
    with pytest.raises(BatchmixError, match=r"\.batchmix/run\.json"):
        open_stored(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"config": {}},
        {"config": 7},
        {"config": {"output": {"format": "no"}}},
        {"config": {"output": {"format": "arrow"}}},
    ],
    ids=str,
)
def test_a_run_file_that_lacks_what_readers_need_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / ".batchmix").mkdir()
    (tmp_path / ".batchmix/run.json").write_text(json.dumps(RUN))
    open_stored(str(tmp_path))
    (tmp_path / ".batchmix/run.json").write_text(json.dumps(RUN | change))
    with pytest.raises(BatchmixError, match=r"\.batchmix/run\.json: is damaged"):
        open_stored(str(tmp_path))


JOURNAL = {"staging": ".batchmix/merge-000001", "add": [".batchmix/merge-000001/part-0"], "remove": ["part-1"]}


@pytest.mark.parametrize(
    "journal",
    [
        "{", "[" * 100_000, "[]", "3", "{}",
        JOURNAL | {"staging": ""}, JOURNAL | {"staging": "../.."}, JOURNAL | {"staging": 3}, JOURNAL | {"staging": ".batchmix/merge-1/.."},
        JOURNAL | {"add": [".batchmix/merge-000001/../../x"]}, JOURNAL | {"add": ["/etc/passwd"]}, JOURNAL | {"add": 3},
        JOURNAL | {"remove": ["../x"]}, JOURNAL | {"remove": [".batchmix/run.json"]}, JOURNAL | {"remove": [["x"]]},
    ],
    ids=repr,
)  # fmt: skip
def test_a_damaged_or_hostile_journal_is_named_and_not_followed(tmp_path: Path, journal: Any) -> None:
    (tmp_path / ".batchmix").mkdir()
    path = tmp_path / ".batchmix/journal-000001.json"
    path.write_text(json.dumps(JOURNAL))
    assert unfinished_exchange(LocalFolder(tmp_path))
    path.write_text(journal if isinstance(journal, str) else json.dumps(journal))
    with pytest.raises(BatchmixError, match=r"\.batchmix/journal-000001.json, .* is damaged"):
        unfinished_exchange(LocalFolder(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"rows": 1}', "[" * 100_000])
def test_damaged_statistics_and_metrics_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (tmp_path / ".batchmix").mkdir()
    (tmp_path / ".batchmix/summary-00000-of-00001.json").write_text(text)
    assert read_runs(LocalFolder(tmp_path), 1) == []
    assert ".batchmix/summary-00000-of-00001.json is damaged" in caplog.text
    (tmp_path / ".batchmix/metrics.jsonl").write_text(text + "\n")
    assert _metrics(LocalFolder(tmp_path)) == []


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "[" * 5000], ids=["bomb", "of itself", "deep"])
def test_yaml_whose_aliases_stand_for_too_much_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(text)
    with pytest.raises(BatchmixError, match=r"annotate.examples=.*task.yaml: cannot be read \("):
        _read(str(path), "annotate.examples")
    if text != "[" * 5000:
        with pytest.raises(BatchmixError, match=r"task.yaml: cannot be read \(.*alias"):
            check_config_files(str(tmp_path))


def test_yaml_with_a_few_aliases_is_read(tmp_path: Path) -> None:
    assert load_yaml("a: &a [1, 2]\nb: [*a, *a]")["b"] == [[1, 2], [1, 2]]
    (tmp_path / "broken.yaml").write_text("a: [")
    check_config_files(str(tmp_path))


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "[" * 5000], ids=["bomb", "of itself", "deep"])
def test_a_task_file_that_is_a_bomb_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(text)
    assert annotate_job([str(path), "data.path=x", "output.dir=out"]) == 1
    assert capsys.readouterr().err.startswith(f"batchmix: error: {path}: cannot be read as a task file (")


def test_a_folder_of_configurations_that_holds_a_bomb_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sampling").mkdir()
    (tmp_path / "sampling" / "mine.yaml").write_text(BOMB)
    assert generate_job(["--config-dir", str(tmp_path), "sampling=mine", "data.path=x", "output.dir=out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"batchmix: error: {tmp_path}/sampling/mine.yaml: cannot be read (its aliases stand for")


BRACES = "{a: " * 3000 + "1" + "}" * 3000


@pytest.mark.parametrize(
    "override",
    slow_after(1, [f"sampling.logit_bias={BRACES}", f"data.path={'[' * 3000}{']' * 3000}"]),
    ids=["map", "list"],
)
def test_an_override_that_is_nested_deeply_is_one_line(capsys: pytest.CaptureFixture[str], override: str) -> None:
    assert generate_job(["data.path=x", "output.dir=out", override]) == 1
    error = capsys.readouterr().err
    assert error.startswith("batchmix: error: ")
    assert len(error.splitlines()) == 1
