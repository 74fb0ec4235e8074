"""A run in an object store (fsspec's, in memory) gives what the same run in a folder gives. (test_s3.py has a real server.)"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from finished_runs import finished

from batchmix.annotate import argilla, label_studio
from batchmix.annotate.config import AnnotateConfig, ExportConfig, ReviewConfig, ReviewTool
from batchmix.annotate.corrections import read_corrections, write_corrections
from batchmix.annotate.export import export
from batchmix.annotate.page import report
from batchmix.annotate.review import review
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.output.config import OutputConfig, OutputFormat
from batchmix.output.stored_run import open_stored
from batchmix.storage import open_file, open_storage
from batchmix.storage.object_store import ObjectStore

TASK = AnnotateConfig(input="{{ text }}", choice=["good", "bad"], field="mood", gold="people")
LINE = {"shard": 0, "prompt_tokens_per_second": 5.0, "running": 8, "kv_blocks_used": 1, "kv_blocks_total": 10}


@pytest.fixture
def stores() -> Iterator[str]:
    """Where all that a test puts into memory lies."""
    yield "memory://annotate-test"
    fsspec.filesystem("memory").rm("/annotate-test", recursive=True)


def files(place: str) -> dict[str, bytes]:
    """All that lies in a folder or under a prefix, by name."""
    fs, root = fsspec.core.url_to_fs(place)
    return {path.removeprefix(root).lstrip("/"): fs.cat_file(path) for path in fs.find(root)}


def handed_over(run: str, place: str) -> None:
    """Report, reviews with both tools and people's answers, and two exports: what is not the run's goes to `place`."""

    def config(**settings: Any) -> Config:
        return Config(output=OutputConfig(dir=run), **settings)

    text = report(config())
    assert text.endswith(f"the report is {run}/.batchmix/report/report.html")
    assert "exact match with people's answers: 75.0%" in text
    for tool in ReviewTool:
        review(config(review=ReviewConfig(tool=tool, path=f"{place}/{tool.value}.json", rows=2)))
    record = {"metadata": {"row": 1, "id": "r1"}, "responses": {"mood": [{"value": "good", "status": "submitted"}]}}
    storage, name = open_file(f"{place}/argilla.json/records.json", "x")
    storage.replace(name, lambda file: file.write(json.dumps([record]).encode()))
    for path in ("argilla.json", "argilla.json/records.json"):
        corrections = f"{place}/corrections-{len(path)}.jsonl"
        review(config(review=ReviewConfig(action="import", tool=ReviewTool.argilla, path=f"{place}/{path}",
                                          corrections=corrections)))  # fmt: skip
    for rows in (2, 3):  # the second is without a file that the first had
        export(config(export=ExportConfig(dir=f"{place}/set", rows_per_file=rows, corrections=corrections)))


@pytest.mark.parametrize("form", list(OutputFormat))
def test_all_that_comes_after_a_run(form: OutputFormat, tmp_path: Path, stores: str) -> None:
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"text": f"text {i}\u2028", "people": "good" if i else None}, [text])
        for i, text in enumerate(["good", "bad", "good", None, "good", "good"])
    ]
    local = str(tmp_path / "run")
    finished(tmp_path / "run", TASK, rows, form=form, template="Judge {{ text }}")
    times = [{"time": 100.0 + 10 * i, "rows": 30 * i, "completion_tokens": 100 * i, "output_tokens_per_second": 50.0} for i in range(3)]  # fmt: skip
    metrics = "".join(json.dumps(LINE | line) + "\n" for line in times)
    (tmp_path / "run/.batchmix/metrics.jsonl").write_text(metrics)
    store = ObjectStore(f"{stores}/run")
    for name, data in files(local).items():  # an object store knows no appending, so it has a file for each shard
        fsspec.filesystem("memory").pipe_file(f"/annotate-test/run/{name.replace('metrics', 'metrics-00000')}", data)
    handed_over(local, str(tmp_path / "place"))
    handed_over(store.url, f"{stores}/place")
    made = files(local)
    assert {".batchmix/checks.json", ".batchmix/report/report.html"} <= made.keys()
    assert b"Throughput" in made[".batchmix/report/report.html"]
    assert {name: data for name, data in files(store.url).items() if "metrics" not in name} == {
        name: data for name, data in made.items() if "metrics" not in name
    }
    handed = files(f"{stores}/place")
    assert handed == files(str(tmp_path / "place"))
    assert sorted(handed) == [
        "argilla.json/.argilla/dataset.json", "argilla.json/.argilla/settings.json", "argilla.json/records.json",
        "corrections-12.jsonl", "corrections-25.jsonl", "label_studio.json", "label_studio.xml",
        "set/README.md", "set/data/train-00000.parquet", "set/data/train-00001.parquet",
    ]  # fmt: skip
    assert b"checked by people (`reviewed`): 1\n" in handed["set/README.md"]


def test_what_cannot_be_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(call: Any, *arguments: Any) -> str:
        with pytest.raises(BatchmixError) as caught:
            call(*arguments)
        return str(caught.value)

    at_hub = ExportConfig(dir="memory://x/set", repo_id="me/x")
    assert message(export, Config(export=at_hub)).startswith(
        "export.dir=memory://x/set: export.repo_id uploads files of this"
    )
    assert (
        message(open_file, "s3://bucket", "review.path") == "review.path=s3://bucket: names a bucket, not a file in it"
    )
    assert message(open_storage, "nothing://x", "export.dir").startswith("export.dir=nothing://x: Protocol not known")
    assert "output.dir=memory://nowhere: holds no .batchmix/run.json" in message(open_stored, "memory://nowhere")
    results = finished(tmp_path / "run", TASK, [({"text": "a"}, ["good"])])
    (tmp_path / "file").write_text("")
    inside = Config(output=OutputConfig(dir=str(tmp_path / "run")), export=ExportConfig(dir=str(tmp_path / "file/set")))
    assert message(export, inside) == f"export.dir={tmp_path}/file/set: cannot be written (Not a directory)"

    part = tmp_path / "run" / results.names[0]
    part.write_bytes(part.read_bytes()[:100])
    unreadable = message(list, results.batches(["row"]))
    assert unreadable.startswith(f"{part}: cannot be read back (")
    assert "; if the file is damaged, delete it" in unreadable, "a store that does not answer is no reason to"

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("Unable to locate credentials")  # botocore's errors are of no other class either

    for method in ("info", "cat_file", "pipe_file"):
        monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, method, refused)
    said = "(Unable to locate credentials)"
    assert message(open_stored, "memory://kept") == f"output.dir=memory://kept: cannot be read {said}"
    assert message(read_corrections, "memory://x/c", []) == f"export.corrections=memory://x/c: cannot be read {said}"
    assert (
        message(write_corrections, "memory://x/c", {}) == f"review.corrections=memory://x/c: cannot be written {said}"
    )
    for tool in (label_studio, argilla):
        assert message(tool.read, "memory://x/c", []) == f"review.path=memory://x/c: cannot be read {said}"
        assert message(tool.write, "memory://x/c", [], [], "m") == f"review.path=memory://x/c: cannot be written {said}"
