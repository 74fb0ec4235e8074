"""`batchmix annotate` as a user runs it, with the built-in model and the example tickets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from batchmix.annotate.config import AnnotateConfig
from batchmix.annotation import annotate
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.output.config import OutputConfig
from batchmix.sampling import SamplingConfig

TICKETS = Path(__file__).parents[2] / "examples/support_tickets.jsonl"
LABELS = pa.dictionary(pa.int32(), pa.string())


@pytest.mark.slow  # the model answers 1,000 messages
def test_the_example_tickets_give_typed_columns_that_people_agree_with(batchmix: Any, tmp_path: Path) -> None:
    done = batchmix("annotate", "tickets", f"data.path={TICKETS}", "output.dir=out")
    assert done.returncode == 0, done.stderr
    table = ds.dataset(tmp_path / "out", format="arrow").to_table()
    assert [table.schema.field(name).type for name in ("sentiment", "topic", "urgent")] == [LABELS, LABELS, pa.bool_()]
    rows = table.to_pylist()
    assert len(rows) == 1000
    exact = sum(
        {name: row[name] for name in ("sentiment", "topic", "urgent")} == json.loads(row["gold"]) for row in rows
    )
    assert exact >= 950
    assert all(row["invalid"] is None and 0 < row["confidence"] <= 1 for row in rows)
    assert f"exact match with people's answers: {exact / 1000:.1%} (" in done.stdout
    checks = json.loads((tmp_path / "out/.batchmix/checks.json").read_text())
    assert checks["exact_match"]["value"] == exact / 1000
    assert 'aria-label="Confusion matrix of topic"' in (tmp_path / "out/.batchmix/report/report.html").read_text()
    summary = json.loads((tmp_path / "out/.batchmix/summary.json").read_text())
    assert len(summary["runs"][0]["expert_tokens"]) == 3  # layers


@pytest.mark.slow  # starts a process that loads the model
def test_a_task_file_of_ones_own(batchmix: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"who": "a", "text": "hello", "label": "wanted"}\n{"who": "b", "text": null}\n'
    )
    (tmp_path / "spam.yaml").write_text("""
annotate:
  instruction: Is this message spam?
  input: "From: {{ who }}\\n{{ text }}"
  choice: [spam, wanted]
  gold: label
sampling: {seed: 3}
""")
    done = batchmix("annotate", "spam.yaml", "data.path=rows.jsonl", "output.dir=out", "annotate.field=verdict")
    assert done.returncode == 0, done.stderr
    assert "model.path=tiny: the built-in model can do the task `tickets` alone" in done.stderr
    assert "rows without an answer (column error): 1, for example: data.template fails on this row" in done.stdout
    again = batchmix("report", "output.dir=out")
    assert again.stdout.splitlines()[-1] == "the report is out/.batchmix/report/report.html"
    assert again.stdout.splitlines()[:-1] == done.stdout.splitlines()[-len(again.stdout.splitlines()) : -1]
    rows = ds.dataset(tmp_path / "out", format="arrow").to_table().sort_by("row").to_pylist()
    assert rows[0]["verdict"] in ("spam", "wanted")
    assert 0.5 <= rows[0]["confidence"] <= 1
    assert (rows[1]["verdict"], rows[1]["error"] is None) == (None, False)
    assert done.stdout.endswith("the report is out/.batchmix/report/report.html\n")
    settings = json.loads((tmp_path / "out/.batchmix/run.json").read_text())["config"]
    assert settings["sampling"]["seed"] == 3
    assert settings["sampling"]["structured_outputs"]["choice"] == ["spam", "wanted"]


def test_gold_that_the_data_does_not_have_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "hello"}\n')
    config = Config(annotate=AnnotateConfig(input="{{ text }}", gold="people"), sampling=SamplingConfig(),
                    data=DataConfig(path=str(tmp_path / "rows.jsonl")), output=OutputConfig(dir=str(tmp_path / "out")))  # fmt: skip
    with pytest.raises(BatchmixError, match=r"annotate\.gold=people: the output keeps no column 'people'; it has text"):
        annotate(config)
    config.annotate.gold = {"labl": "text"}
    with pytest.raises(BatchmixError, match="labl is no field of the answer; those are label"):
        annotate(config)
    assert not (tmp_path / "out").exists()


def test_request_files_have_prompts_already(tmp_path: Path) -> None:
    request = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "x"}]},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(request) + "\n")
    config = Config(annotate=AnnotateConfig(input="{{ custom_id }}"), data=DataConfig(path=str(tmp_path / "rows.jsonl")),
                    output=OutputConfig(dir=str(tmp_path / "out")))  # fmt: skip
    with pytest.raises(BatchmixError, match="its requests are prompts already"):
        annotate(config)
