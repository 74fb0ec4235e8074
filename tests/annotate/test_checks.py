"""The checks of a finished run: what they read, and what they compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from finished_runs import finished

from batchmix.annotate.checks import check_results, checks_text, read_checks, write_checks
from batchmix.annotate.config import AnnotateConfig
from batchmix.errors import BatchmixError
from batchmix.output.config import OutputFormat

TICKET = {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}, "urgent": {"type": "boolean"},
                                           "score": {"type": "integer"}}}  # fmt: skip


def handle(mood: str, urgent: bool, score: int) -> str:
    return json.dumps({"mood": mood, "urgent": urgent, "score": score})


@pytest.mark.parametrize("form", list(OutputFormat))
@pytest.mark.parametrize("gold_as", ["json", "object", "columns"])
def test_every_form_of_gold_in_every_format(form: OutputFormat, gold_as: str, tmp_path: Path) -> None:
    true = [("good", True, 1), ("bad", False, 2), ("bad", True, 3), ("good", True, 4), ("good", False, 5)]
    said = [("good", True, 1), ("bad", True, 2), ("good", True, 3), None, ("good", False, 5)]
    rows: list[tuple[dict[str, Any], list[str | None]]] = []
    for truth, answer in zip(true, said, strict=True):
        values = dict(zip(("mood", "urgent", "score"), truth, strict=True))
        given = {"json": {"gold": json.dumps(values)}, "object": {"gold": values},
                 "columns": {"mood": values["mood"], "u": values["urgent"], "s": values["score"]}}[gold_as]  # fmt: skip
        rows.append((given, ["oops" if answer is None else handle(*answer)]))
    rows.append(({}, [handle("bad", True, 1)]))  # nobody labelled it
    rows.append((rows[0][0], [None]))
    gold = "gold" if gold_as != "columns" else {"mood": "mood", "urgent": "u", "score": "s"}
    results = finished(tmp_path, AnnotateConfig(input="x", json_schema=TICKET), rows, form=form)
    checks = write_checks(results, gold, 200)
    assert checks == read_checks(results.storage) == json.loads(json.dumps(checks))
    assert (checks["rows"], checks["error_rows"], checks["invalid_rows"]) == (7, 1, 1)
    assert checks["exact_match"]["value"] == 2 / 5
    mood = checks["fields"]["mood"]["agreement"]
    assert mood["labels"] == ["(no answer)", "bad", "good"]
    assert mood["confusion"] == [[0, 0, 0], [0, 1, 1], [1, 0, 2]]
    assert checks["fields"]["urgent"]["agreement"]["accuracy"]["value"] == 3 / 5
    assert checks["fields"]["mood"]["labels"] == {"good": 3, "bad": 2}
    assert "exact match with people's answers: 40.0%" in checks_text(checks)


def test_without_gold_there_are_counts_and_the_rows_that_samples_disagree_on(tmp_path: Path) -> None:
    task = AnnotateConfig(input="x", choice=["a", "b"], field="kind")
    results = finished(
        tmp_path, task, [({}, ["a", "a", "a"]), ({}, ["a", "b", "b"]), ({}, ["?", "!", "?"]), ({}, ["a"] * 3)]
    )
    checks = check_results(results, None, 100)
    assert checks["fields"]["kind"]["labels"] == {"a": 2, "b": 1}
    assert [(entry["row"], entry["certainty"]) for entry in checks["least_certain"]] == [(2, 0.0), (1, 2 / 3)]
    assert "exact_match" not in checks
    assert "agreement" not in checks["fields"]["kind"]


def test_what_looks_wrong_is_said(tmp_path: Path) -> None:
    """Gold of something else, and why rows have no answer."""
    task = AnnotateConfig(input="x", choice=["a", "b"], field="kind")
    rows = [({"gold": "7"}, ["a"]), ({"gold": "8"}, ["b"]), ({"gold": "a"}, [None])]
    text = checks_text(check_results(finished(tmp_path, task, rows), "gold", 100))
    assert "rows without an answer (column error): 1, for example: no prompt" in text
    assert "no gold value of kind is one of its labels: is annotate.gold the right column?" in text
    rows[0] = ({"gold": "b"}, ["a"])
    text = checks_text(check_results(finished(tmp_path / "b", task, rows), "gold", 100))
    assert "right column" not in text
    assert "gold values of kind that are none of its labels, which count as wrong: 1 ('8' 1)" in text


def test_confidence_is_calibrated_against_gold(tmp_path: Path) -> None:
    import math

    task = AnnotateConfig(input="x", choice=["a", "b"], gold="gold")
    rows: list[tuple[dict[str, Any], list[str | None]]] = [({"gold": "a"}, ["a"])] * 3 + [({"gold": "a"}, ["b"])]
    results = finished(tmp_path, task, rows, logprobs=[math.log(0.75)] * 4)
    calibration = check_results(results, "gold", 100)["calibration"]
    assert calibration["expected_calibration_error"]["value"] == pytest.approx(0)
    assert [(entry["rows"], entry["accuracy"]) for entry in calibration["bins"]] == [(4, 0.75)]


def test_a_number_with_many_values_is_no_class(tmp_path: Path) -> None:
    task = AnnotateConfig(input="x", json_schema={"type": "object", "properties": {"n": {"type": "integer"}}})
    rows: list[tuple[dict[str, Any], list[str | None]]] = [({"g": i}, [json.dumps({"n": i})]) for i in range(60)]
    field = check_results(finished(tmp_path, task, rows), {"n": "g"}, 100)["fields"]["n"]
    assert field["exact_match"]["value"] == 1.0
    assert "agreement" not in field


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ("nowhere", "annotate.gold=nowhere: the rows have no column 'nowhere'"),
        ({"kind": "gold"}, "kind is no field of the answer; those are mood, urgent, score"),
        ("word", "annotate.gold=word: row 0 holds no JSON object; a column of one field's labels is written annotate.gold={FIELD: word}"),
    ],
)  # fmt: skip
def test_gold_that_is_not_there_is_refused(gold: Any, message: str, tmp_path: Path) -> None:
    task = AnnotateConfig(input="x", json_schema=TICKET)
    results = finished(tmp_path, task, [({"gold": "{}", "word": "good"}, [handle("good", True, 1)])])
    with pytest.raises(BatchmixError) as caught:
        check_results(results, gold, 100)
    assert message in str(caught.value)


def test_a_run_without_a_task_has_no_labels(tmp_path: Path) -> None:
    results = finished(tmp_path, AnnotateConfig(), [({"text": "a"}, ["b"])])
    assert [row["generated_text"] for row in results.rows()] == ["b"]
    with pytest.raises(BatchmixError, match="has no labels to check"):
        check_results(results, None, 100)


def test_records_come_back_typed_from_lines_of_json(tmp_path: Path) -> None:
    task = AnnotateConfig(input="x", choice=["a", "b"])
    results = finished(tmp_path, task, [({"n": 1}, ["a"]), ({"n": None}, ["?"])], form=OutputFormat.jsonl)
    assert results.schema.field("label").type == pa.dictionary(pa.int32(), pa.string())
    assert results.schema.field("n").type == pa.int64()
    assert [row["label"] for row in results.rows(["label"])] == ["a", None]
