"""Rows to people and back. The samples of other tools' formats were written by those tools' own libraries:
label-studio-sdk 2.1.2 (whose LabelInterface also accepts our tasks) and argilla 2.8.0."""

from __future__ import annotations

import json
import math
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from finished_runs import finished

from batchmix.annotate import argilla, label_studio
from batchmix.annotate.config import AnnotateConfig, ReviewConfig, ReviewTool
from batchmix.annotate.corrections import Correction, check_value
from batchmix.annotate.results import Results
from batchmix.annotate.review import least_certain, review
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.jobs.export import main as export_main
from batchmix.jobs.review import main as review_main
from batchmix.output.config import OutputConfig

SCHEMA = {"type": "object", "properties": {
    "mood": {"enum": ["good", "bad & <ugly>"]}, "urgent": {"type": "boolean"},
    "score": {"type": "integer", "minimum": 1, "maximum": 5},
    "Why Not": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}}}  # fmt: skip
MODEL_SAYS = {"mood": "good", "urgent": True, "score": 3, "Why Not": 'say "why"', "tags": ["x"]}

# An annotated task as Label Studio's JSON export has it (https://labelstud.io/grammar/task_format).
EXPORTED_TASK: dict[str, Any] = {
    "id": 1, "data": {"row": 2, "id": "r2", "prompt": "p", "answer": "a"}, "created_at": "2021-03-09T21:52:49.513742Z",
    "updated_at": "2021-03-09T22:16:08.746926Z", "project": 83,
    "annotations": [{
        "id": "1001", "was_cancelled": False, "ground_truth": False, "created_at": "2021-03-09T22:16:08.728353Z",
        "updated_at": "2021-03-09T22:16:08.728378Z", "lead_time": 4.288, "result_count": 0, "task": 1, "completed_by": 10,
        "result": [
            {"from_name": "mood", "id": "Dx_aB91ISN", "origin": "manual", "to_name": "prompt_text", "type": "choices",
             "value": {"choices": ["bad & <ugly>"]}},
            {"from_name": "urgent", "id": "b", "to_name": "prompt_text", "type": "choices", "value": {"choices": ["false"]}},
            {"from_name": "score", "id": "c", "to_name": "prompt_text", "type": "number", "value": {"number": 5}},
            {"from_name": "Why Not", "id": "d", "to_name": "prompt_text", "type": "textarea", "value": {"text": ["because"]}},
            {"from_name": "tags", "id": "e", "to_name": "prompt_text", "type": "textarea", "value": {"text": ["[\"y\", \"z\"]"]}},
        ],
    }, {"id": "1002", "was_cancelled": True, "result": []}],
    "predictions": [],
}  # fmt: skip
PEOPLE_SAY = {"mood": "bad & <ugly>", "urgent": False, "score": 5, "Why Not": "because", "tags": ["y", "z"]}

# A record as argilla.Dataset.to_disk writes it.
EXPORTED_RECORD: dict[str, Any] = {
    "id": "2", "fields": {"prompt": "p"}, "metadata": {"row": 2, "id": "r2"},
    "suggestions": {"mood": {"value": "good", "score": 0.9, "agent": "m"}},
    "responses": {
        "mood": [{"value": "bad & <ugly>", "user_id": "2cee6494-a904-4572-a759-09d7ec31d972"}],
        "urgent": [{"value": "false", "user_id": "2cee6494-a904-4572-a759-09d7ec31d972"}],
        "score": [{"value": "5", "user_id": "2cee6494-a904-4572-a759-09d7ec31d972"}],
        "field_3": [{"value": "because", "user_id": "2cee6494-a904-4572-a759-09d7ec31d972"}],
        "tags": [{"value": "[\"y\", \"z\"]", "user_id": "2cee6494-a904-4572-a759-09d7ec31d972"}],
    },
    "vectors": {}, "status": "completed", "_server_id": None,
}  # fmt: skip
ARGILLA_QUESTION_KEYS = {"name", "settings", "title", "description", "required", "type"}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"text": f"text {i}"}, [json.dumps(MODEL_SAYS)]) for i in range(6)
    ]
    rows[4] = ({"text": "broken"}, ["?"])
    rows[5] = ({"text": "not run"}, [None])
    logprobs = [math.log(certainty) for certainty in (0.9, 0.8, 0.3, 0.6, 0.99, 0.1)]
    return finished(
        tmp_path / "run", AnnotateConfig(input="x", json_schema=SCHEMA), rows, logprobs, template="Judge {{ text }}"
    )


def do(results: Results, **settings: Any) -> None:
    review(Config(output=OutputConfig(dir=results.url), review=ReviewConfig(**settings)))


def test_the_least_certain_rows_come_first(results: Results) -> None:
    items = least_certain(results, 3)
    assert [(item.row, item.prompt) for item in items] == [
        (4, "Judge broken"),
        (2, "Judge text 2"),
        (3, "Judge text 3"),
    ]
    assert items[0].values == {}
    assert items[1].values == MODEL_SAYS


def test_label_studio_takes_tasks_with_the_models_answers(results: Results, tmp_path: Path) -> None:
    do(results, path=str(tmp_path / "new/tasks.json"), rows=2)
    tasks = json.loads((tmp_path / "new/tasks.json").read_text())
    assert tasks[0]["predictions"][0]["result"] == []
    prediction = tasks[1]["predictions"][0]
    assert tasks[1]["data"] == {"row": 2, "id": "r2", "prompt": "Judge text 2", "answer": json.dumps(MODEL_SAYS)}
    assert prediction["score"] == pytest.approx(0.3)
    assert [(result["from_name"], result["type"], result["value"]) for result in prediction["result"]] == [
        ("mood", "choices", {"choices": ["good"]}),
        ("urgent", "choices", {"choices": ["true"]}),
        ("score", "number", {"number": 3}),
        ("Why Not", "textarea", {"text": ['say "why"']}),
        ("tags", "textarea", {"text": ['["x"]']}),
    ]
    view = ElementTree.parse(tmp_path / "new/tasks.xml").getroot()
    controls = {element.get("name"): element for element in view if element.get("toName")}
    objects = {element.get("name"): element.get("value") for element in view if element.tag == "Text"}
    assert list(controls) == list(MODEL_SAYS)
    assert [choice.get("value") for choice in controls["mood"]] == ["good", "bad & <ugly>"]
    for element in controls.values():
        assert objects[element.get("toName")] == "$prompt"
    for result in prediction["result"]:
        assert controls[result["from_name"]].tag.lower() == result["type"]


@pytest.mark.parametrize(
    ("schema", "attributes"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 5}, {"min": "1", "max": "5", "step": "1"}),
        ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 5.5}, {"min": "1", "max": "5", "step": "1"}),
        ({"type": "integer", "multipleOf": 10}, {"step": "10"}),
        ({"enum": [3, 1, 2]}, {"min": "1", "max": "3", "step": "1"}),
        ({"anyOf": [{"$ref": "#/$defs/share"}, {"type": "null"}]}, {"min": "0", "max": "1.5"}),
        ({"type": "number"}, {}),
    ],
)
def test_numbers_have_the_limits_of_the_schema(tmp_path: Path, schema: Any, attributes: dict[str, str]) -> None:
    whole = {
        "type": "object",
        "properties": {"n": schema},
        "$defs": {"share": {"type": "number", "minimum": 0, "maximum": 1.5}},
    }
    task = AnnotateConfig(input="x", json_schema=whole)
    do(finished(tmp_path / "run", task, [({"text": "a"}, ["?"])]), path=str(tmp_path / "tasks.json"))
    (number,) = ElementTree.parse(tmp_path / "tasks.xml").getroot().iter("Number")
    assert number.attrib == {"name": "n", "toName": "prompt_text", **attributes}


def test_values_of_people_fit_schemas_behind_references(tmp_path: Path) -> None:
    share = {"type": "number", "minimum": 0, "maximum": 1}
    whole = {"type": "object", "properties": {"n": {"$ref": "#/$defs/share"}, "m": {"$ref": "#/$defs/share"}}, "required": ["m"],
             "$defs": {"share": share}}  # fmt: skip
    answer = finished(tmp_path / "run", AnnotateConfig(input="x", json_schema=whole), [({"text": "a"}, ["?"])]).answer
    assert answer is not None
    optional, required = answer.fields
    assert check_value(optional, 0.5, "here") == 0.5
    assert check_value(optional, None, "here") is None
    with pytest.raises(
        BatchmixError, match=r"^here: n=1\.5 does not fit the schema: 1\.5 is greater than the maximum of 1$"
    ):
        check_value(optional, 1.5, "here")
    with pytest.raises(BatchmixError, match=r"^here: m=None does not fit the schema: None is not of type 'number'$"):
        check_value(required, None, "here")


def test_many_labels_are_a_menu(tmp_path: Path) -> None:
    labels = [f"l{number}" for number in range(200)]
    many = finished(tmp_path / "many", AnnotateConfig(input="x", choice=labels), [({"text": "a"}, ["l7"])])
    do(many, path=str(tmp_path / "tasks.json"))
    choices = next(ElementTree.parse(tmp_path / "tasks.xml").getroot().iter("Choices"))
    assert (choices.get("layout"), len(choices)) == ("select", 200)


def test_label_studios_export_is_read(results: Results, tmp_path: Path) -> None:
    assert results.answer is not None
    (tmp_path / "export.json").write_text(json.dumps([EXPORTED_TASK, {**EXPORTED_TASK, "annotations": []}]))
    do(results, action="import", path=str(tmp_path / "export.json"), corrections=str(tmp_path / "c.jsonl"))
    assert [json.loads(line) for line in (tmp_path / "c.jsonl").open()] == [
        {"row": 2, "id": "r2", "values": PEOPLE_SAY}
    ]


GOOD = {"from_name": "mood", "type": "choices", "value": {"choices": ["good"]}}


@pytest.mark.parametrize(
    ("annotations", "mood"),
    [
        ([{"was_cancelled": False, "result": None}, {"was_cancelled": False, "result": [GOOD]}], "good"),
        ([{"result": [{**GOOD, "value": {"choices": []}}]}, {"result": [GOOD]}], "good"),
        ([{"was_cancelled": True, "result": [GOOD]}], None),
        (None, None),
        ([], None),
        ([{"result": None}], None),
        ([{}], None),
        ([{"result": [{**GOOD, "value": {"choices": []}}]}], None),
        ([{"result": [{**GOOD, "value": None}]}], None),
        ([{"result": [{**GOOD, "value": {"text": []}}]}], None),
        ([{"result": [{**GOOD, "value": {"number": None}}]}], None),
    ],
)
def test_what_people_left_out_is_no_answer(
    results: Results, tmp_path: Path, annotations: Any, mood: str | None
) -> None:
    path = tmp_path / "export.json"
    path.write_text(json.dumps([{"data": {"row": 0, "id": "r0"}, "annotations": annotations}]))
    if mood is None:
        with pytest.raises(BatchmixError, match=r"export.json: has no answers of people yet$"):
            do(results, action="import", path=str(path), corrections=str(tmp_path / "c.jsonl"))
    else:
        assert results.answer is not None
        assert label_studio.read(str(path), results.answer.fields) == {0: Correction("r0", {"mood": mood})}


@pytest.mark.parametrize(
    "task",
    [
        {"data": None, "annotations": []},
        {"data": {"row": None}, "annotations": []},
        {"data": {"row": "x"}, "annotations": []},
        {"data": {"row": 0, "id": "r0"}, "annotations": 5},
        {"data": {"row": 0, "id": "r0"}, "annotations": [None]},
        {"data": {"row": 0, "id": "r0"}, "annotations": [{"result": "x"}]},
        {"data": {"row": 0, "id": "r0"}, "annotations": [{"result": [5]}]},
        {"data": {"row": 0, "id": "r0"}, "annotations": [{"result": [{**GOOD, "value": {"text": [5]}}]}]},
    ],
)
def test_what_label_studio_does_not_write_is_one_line(results: Results, tmp_path: Path, task: Any) -> None:
    path = tmp_path / "export.json"
    path.write_text(json.dumps([task]))
    with pytest.raises(BatchmixError, match="task 1") as caught:
        do(results, action="import", path=str(path), corrections=str(tmp_path / "c.jsonl"))
    assert "\n" not in str(caught.value)


def test_of_several_people_most_decide(results: Results, tmp_path: Path) -> None:
    assert results.answer is not None

    def annotation(mood: str) -> dict[str, Any]:
        return {"result": [{"from_name": "mood", "type": "choices", "value": {"choices": [mood]}}]}

    task = {
        "data": {"row": 0, "id": "r0"},
        "annotations": [annotation("good"), annotation("bad & <ugly>"), annotation("bad & <ugly>")],
    }
    (tmp_path / "export.json").write_text(json.dumps([task]))
    assert label_studio.read(str(tmp_path / "export.json"), results.answer.fields) == {
        0: Correction("r0", {"mood": "bad & <ugly>"})
    }


def test_argilla_takes_a_folder_and_gives_one_back(results: Results, tmp_path: Path) -> None:
    assert results.answer is not None
    folder = tmp_path / "review"
    do(results, path=str(folder), tool=ReviewTool.argilla, rows=2)
    settings = json.loads((folder / ".argilla/settings.json").read_text())
    assert [question["name"] for question in settings["questions"]] == ["mood", "urgent", "score", "field_3", "tags"]
    assert all(set(question) == ARGILLA_QUESTION_KEYS for question in settings["questions"])
    assert settings["questions"][0]["settings"]["options"][1] == {"text": "bad & <ugly>", "value": "bad & <ugly>"}
    records = json.loads((folder / "records.json").read_text())
    assert set(records[1]) == {"id", "fields", "metadata", "suggestions", "responses", "vectors"}
    assert records[1]["suggestions"]["field_3"]["value"] == 'say "why"'
    (folder / "records.json").write_text(json.dumps([EXPORTED_RECORD, records[0]]))
    do(results, action="import", tool=ReviewTool.argilla, path=str(folder), corrections=str(tmp_path / "c.jsonl"))
    assert [json.loads(line) for line in (tmp_path / "c.jsonl").open()] == [
        {"row": 2, "id": "r2", "values": PEOPLE_SAY}
    ]


def said_of(*rows: tuple[int, str]) -> str:
    """Label Studio's export in which a person calls each row, given with its id, good."""
    return json.dumps([{"data": {"row": row, "id": id}, "annotations": [{"result": [GOOD]}]} for row, id in rows])


def test_a_review_of_the_rows_in_another_order_is_refused(results: Results, tmp_path: Path) -> None:
    export, corrections = tmp_path / "export.json", tmp_path / "c.jsonl"
    export.write_text(said_of((0, "r0"), (1, "r2"), (2, "r1"), (9, "r9")))
    with pytest.raises(BatchmixError) as caught:
        do(results, action="import", path=str(export), corrections=str(corrections))
    assert f"2 of 4 rows have another id in output.dir={results.url} (row 1 is 'r2' there and 'r1' in the run)" in str(
        caught.value
    )
    assert not corrections.exists()


@pytest.mark.parametrize("tool", list(ReviewTool))
def test_a_review_of_other_prompts_is_told_of_where_ids_are_ordinals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tool: ReviewTool
) -> None:
    def run(name: str, *texts: str) -> Results:
        task = AnnotateConfig(input="x", choice=["good", "bad"], field="mood")
        rows: list[tuple[dict[str, Any], list[str | None]]] = [({"text": text}, ["good"]) for text in texts]
        return finished(tmp_path / name, task, rows, template="Judge {{ text }}", id="{row}")

    first, second = run("first", "a", "b", "c"), run("second", "b", "a", "c")
    folder = tmp_path / "review.json"
    do(first, path=str(folder), tool=tool)
    path = folder / "records.json" if tool is ReviewTool.argilla else folder
    tasks = json.loads(path.read_text())
    for task in tasks:
        task["annotations"] = [{"result": [GOOD]}]
        task["responses"] = {"mood": [{"value": "good"}]}
    path.write_text(json.dumps(tasks))
    for results, told in ((first, False), (second, True)):
        capsys.readouterr()
        do(results, action="import", path=str(folder), tool=tool, corrections=str(tmp_path / "c.jsonl"))
        assert (f"2 rows have another prompt in output.dir={results.url}" in capsys.readouterr().out) == told


def test_reviewed_rows_that_the_run_does_not_have_are_left_out(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export, corrections = tmp_path / "export.json", tmp_path / "c.jsonl"
    export.write_text(said_of((9, "r9")))
    with pytest.raises(BatchmixError, match=r"none of its 1 rows is in output\.dir="):
        do(results, action="import", path=str(export), corrections=str(corrections))
    export.write_text(said_of((3, "r3"), (9, "r9"), (10, "r10")))
    do(results, action="import", path=str(export), corrections=str(corrections))
    assert "2 rows left out, which are not in output.dir=" in capsys.readouterr().out
    assert [json.loads(line)["row"] for line in corrections.open()] == [3]


def test_a_file_that_review_export_did_not_write_is_kept(results: Results, tmp_path: Path) -> None:
    own = tmp_path / "tickets.csv"
    own.write_text("text\nhello\n")
    with pytest.raises(BatchmixError, match=r"tickets\.csv: is there and was not written by review export"):
        do(results, path=str(own))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["tickets.csv"]
    assert own.read_text() == "text\nhello\n"

    answered = tmp_path / "answered.json"
    answered.write_text(said_of((1, "r1")))
    with pytest.raises(BatchmixError, match=r"answered\.json: is there and was not written by review export"):
        do(results, path=str(answered))
    assert answered.read_text() == said_of((1, "r1"))

    (tmp_path / "page.xml").write_text("<html/>")
    with pytest.raises(BatchmixError, match=r"page\.xml beside it is there and was not written by review export"):
        do(results, path=str(tmp_path / "page.json"))
    assert not (tmp_path / "page.json").exists()
    with pytest.raises(BatchmixError, match=r"new\.xml is the labelling interface's"):
        do(results, path=str(tmp_path / "new.xml"))


@pytest.mark.parametrize("tool", list(ReviewTool))
def test_a_review_that_nobody_answered_may_be_written_again(results: Results, tmp_path: Path, tool: ReviewTool) -> None:
    for rows in (2, 3):
        do(results, path=str(tmp_path / "review.json"), tool=tool, rows=rows)
    name = "review.json/records.json" if tool is ReviewTool.argilla else "review.json"
    assert len(json.loads((tmp_path / name).read_text())) == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("records.json", json.dumps([EXPORTED_RECORD])),
        ("records.json", "my records"),
        (".argilla/settings.json", '{"guidelines": "mine"}'),
    ],
)
def test_an_argilla_folder_of_people_is_kept(results: Results, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "folder/.argilla").mkdir(parents=True)
    (tmp_path / "folder" / name).write_text(text)
    with pytest.raises(BatchmixError, match="is there and is not as review export wrote it"):
        do(results, path=str(tmp_path / "folder"), tool=ReviewTool.argilla)
    assert (tmp_path / "folder" / name).read_text() == text
    assert [path.name for path in (tmp_path / "folder").rglob("*") if path.is_file()] == [Path(name).name]


def test_corrections_replace_earlier_corrections_alone(results: Results, tmp_path: Path) -> None:
    export, corrections = tmp_path / "export.json", tmp_path / "c.jsonl"
    export.write_text(said_of((1, "r1")))
    corrections.write_text('{"text": "a row of the data"}\n')
    for place in (export, corrections):
        text = place.read_text()
        with pytest.raises(BatchmixError, match="is there and is no file of corrections"):
            do(results, action="import", path=str(export), corrections=str(place))
        assert place.read_text() == text
    corrections.write_text('{"row": 0, "values": {}}\n')
    do(results, action="import", path=str(export), corrections=str(corrections))
    assert [json.loads(line)["row"] for line in corrections.open()] == [1]


def run_printed(out: str) -> None:
    """The command of the last line, as a shell and Hydra read it, in this process."""
    words = shlex.split(out.splitlines()[-1])
    assert words[0] == "batchmix"
    main = {"review": review_main, "export": export_main}[words[1]]
    assert main(words[2:]) == 0


@pytest.mark.parametrize("tool", list(ReviewTool))
@pytest.mark.parametrize("name", ["run", "it's my, {run}=1 $HOME", "dataset"])
def test_printed_commands_run(
    name: str, tool: ReviewTool, results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(name)
    do(Results(name), path=f"{name} r.json", tool=tool, rows=2)
    if tool is ReviewTool.argilla:
        Path(f"{name} r.json-answers").mkdir()
        Path(f"{name} r.json-answers/records.json").write_text(json.dumps([EXPORTED_RECORD]))
    else:
        Path(f"{name} r-answers.json").write_text(said_of((2, "r2")))
    run_printed(capsys.readouterr().out)
    run_printed(capsys.readouterr().out)
    folder = "dataset-reviewed" if name == "dataset" else "dataset"
    rows = pq.read_table(Path(folder) / "data/train-00000.parquet").to_pylist()
    assert [row["row"] for row in rows if row["reviewed"]] == [2]


def test_printed_commands_have_no_secrets(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("batchmix.annotate.review.Results", lambda url: results)
    secret = "s3://key:" + "pa55word" + "@host/run"
    review(Config(output=OutputConfig(dir=secret), review=ReviewConfig(path=str(tmp_path / "tasks.json"))))
    out = capsys.readouterr().out
    assert "output.dir='s3://***@host/run'" in out
    assert "pa55word" not in out


def test_drafts_and_discarded_responses_do_not_count(results: Results, tmp_path: Path) -> None:
    assert results.answer is not None
    said = [
        {"value": "good", "status": "draft"},
        {"value": "bad & <ugly>", "status": "submitted"},
        {"value": "good", "status": "discarded"},
    ]
    record = {
        "metadata": {"row": 1, "id": "r1"},
        "responses": {"mood": said, "score": [{"value": "1", "status": "draft"}]},
    }
    (tmp_path / "records.json").write_text(json.dumps([record]))
    assert argilla.read(str(tmp_path / "records.json"), results.answer.fields) == {
        1: Correction("r1", {"mood": "bad & <ugly>"})
    }


@pytest.mark.parametrize(
    ("tool", "content", "message"),
    [
        ("label_studio", '[{"row": 2, "mood": "good"}]', "task 1: is no task of Label Studio's JSON export (not JSON-MIN)"),
        ("label_studio", "[", "cannot be read"),
        ("label_studio", '[{"data": {"row": 1, "id": "r1"}, "annotations": []}]', "has no answers of people yet"),
        ("label_studio", '[{"data": {"row": 1, "id": "r1"}, "annotations": [{"result": [{"from_name": "x", "value": {}}]}]}]', "x is no field of the answers"),
        ("label_studio", '[{"data": {"row": 1, "id": "r1"}, "annotations": [{"result": [{"from_name": "score", "value": {"text": "many"}}]}]}]',
         "score='many' is no JSON of int64"),
        ("label_studio", '[{"data": {"row": 1, "id": "r1"}, "annotations": [{"result": [{"from_name": "score", "value": {"number": 9}}]}]}]',
         "task 1: score=9 does not fit the schema: 9 is greater than the maximum of 5"),
        ("label_studio", '[{"data": {"row": 1, "id": "r1"}, "annotations": [{"result": [{"from_name": "score", "value": {"number": 2.5}}]}]}]',
         "task 1: score=2.5 does not fit the schema: 2.5 is not of type 'integer'"),
        ("argilla", '[{"metadata": {"row": 1, "id": "r1"}, "responses": {"score": [{"value": "0"}]}}]',
         "record 1: score=0 does not fit the schema: 0 is less than the minimum of 1"),
        ("label_studio", '[{"data": {"row": 1, "id": "r1"}, "annotations": [{"result": [{"from_name": "urgent", "value": {"choices": ["1"]}}]}]}]',
         "urgent=1 must be bool"),
        ("label_studio", '[{"data": {"row": 1}, "annotations": []}]', "task 1: has no data.id"),
        ("argilla", '[{"metadata": {}}]', "record 1: has no metadata.row"),
        ("argilla", '[{"metadata": {"row": 1}}]', "record 1: has no metadata.id"),
        ("argilla", '[{"metadata": {"row": 1, "id": "r1"}, "responses": {"x": []}}]', "x is no question of ours; those are mood, urgent"),
        ("argilla", '[{"metadata": {"row": 1, "id": "r1"}, "responses": {"mood": [{"value": "fine"}]}}]', "mood='fine' must be one of good, bad"),
    ],
)  # fmt: skip
def test_an_export_that_does_not_fit_is_refused(
    results: Results, tmp_path: Path, tool: str, content: str, message: str
) -> None:
    (tmp_path / "export.json").write_text(content)
    with pytest.raises(BatchmixError) as caught:
        do(
            results,
            action="import",
            tool=ReviewTool[tool],
            path=str(tmp_path / "export.json"),
            corrections=str(tmp_path / "c"),
        )
    assert message in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_reviewed_is_refused(results: Results, tmp_path: Path) -> None:
    with pytest.raises(BatchmixError, match="must be export or import"):
        do(results, action="send")
    with pytest.raises(BatchmixError, match=r"review\.path is not set"):
        do(results)
    finished(tmp_path / "plain", AnnotateConfig(), [({"prompt": "a"}, ["b"])])
    with pytest.raises(BatchmixError, match="so there are no labels to review"):
        do(Results(str(tmp_path / "plain")), path="x")
