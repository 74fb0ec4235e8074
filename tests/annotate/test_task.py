"""Task files: the prompts that they make, and what is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hypothesis import given
from hypothesis import strategies as st
from slow_cases import slow_after

from batchmix.annotate.answer import Json
from batchmix.annotate.config import AnnotateConfig
from batchmix.annotate.misread import misread_labels
from batchmix.annotate.task import answer_of, prepare
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.hydra_app import register, to_config
from batchmix.input.config import DataConfig
from batchmix.jobs.annotate import main
from batchmix.sampling import SamplingConfig
from batchmix.templates.template import RowTemplate

pydantic = pytest.importorskip("pydantic")  # of the `annotate` extra

TASKS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf/annotate").glob("*.yaml"))
COLUMNS = {
    "text": "TEXT",
    "target_language": "French",
    "question": "QUESTION",
    "answer_a": "FIRST",
    "answer_b": "SECOND",
    "messages": [{"role": "user", "content": "MESSAGE"}],
}


class Ticket(pydantic.BaseModel):
    """A pydantic class as a user has one."""

    topic: str
    score: int | None = None


def prompt(task: AnnotateConfig, columns: dict[str, Any]) -> str:
    template = prepare(Config(annotate=task, data=DataConfig(path="x"))).data.template
    assert template is not None
    return RowTemplate(template).render(columns)


@pytest.mark.parametrize("name", slow_after(3, TASKS))
def test_every_task_that_ships_makes_a_prompt(name: str) -> None:
    register("annotate")
    with initialize_config_module("batchmix.conf", version_base="1.3"):
        config = to_config(
            compose("annotate", overrides=["data.path=x", "output.dir=out", f"annotate={name}"]), "annotate"
        )
    prepared = prepare(config)
    answer = answer_of(prepared.annotate)
    assert answer is not None
    assert answer.fields
    assert prepared.data.template is not None
    text = RowTemplate(prepared.data.template).render(COLUMNS)
    last = text.rstrip().removesuffix("Answer:").rstrip().rpartition(" ")[2]
    assert last.rpartition("\n")[2] in ("TEXT", "SECOND", "MESSAGE"), "the row's own text comes last"


def test_the_instruction_comes_first_then_the_form_the_examples_and_the_row() -> None:
    task = AnnotateConfig(
        instruction="Judge.\n",
        input="{{ text }}\n",
        choice=["good", "bad"],
        examples=[{"text": "fine", "answer": "good"}],
    )
    assert prompt(task, {"text": "poor"}) == (
        "Judge.\n\nAnswer with one of these words and nothing else: good, bad\n\n"
        "Input: fine\nAnswer: good\n\nInput: poor\nAnswer:"
    )


@given(st.text(min_size=1), st.text(min_size=1))
def test_no_text_of_an_example_is_taken_for_jinja(shown: str, answer: str) -> None:
    answer = answer if answer.strip() else "x"
    task = AnnotateConfig(input="{{ text }}", examples=[{"text": shown, "answer": answer}])
    assert prompt(task, {"text": "{{ row }}"}) == f"Input: {shown}\nAnswer: {answer}\n\nInput: {{{{ row }}}}\nAnswer:"


def test_an_example_may_be_columns_or_the_text_itself() -> None:
    task = AnnotateConfig(
        input="{{ a }}+{{ b }}", examples=[{"a": 1, "b": 2, "answer": "3"}, {"input": "{{ 5 }}", "answer": "5"}]
    )
    assert prompt(task, {"a": 3, "b": 4}) == "Input: 1+2\nAnswer: 3\n\nInput: {{ 5 }}\nAnswer: 5\n\nInput: 3+4\nAnswer:"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "yaml"])
def test_examples_and_schemas_may_be_files(suffix: str, tmp_path: Path) -> None:
    example = {"text": "a", "answer": {"n": 1}}
    (tmp_path / f"examples.{suffix}").write_text(json.dumps(example if suffix == "jsonl" else [example]))
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    task = AnnotateConfig(
        input="{{ text }}", json_schema=str(tmp_path / "schema.json"), examples=str(tmp_path / f"examples.{suffix}")
    )
    assert prompt(task, {"text": "b"}) == 'Input: a\nAnswer: {"n": 1}\n\nInput: b\nAnswer:'


def test_a_pydantic_class_gives_its_schema() -> None:
    import sys

    sys.modules["a_users_module"] = sys.modules[__name__]
    task = AnnotateConfig(input="{{ text }}", pydantic="a_users_module:Ticket")
    prepared = prepare(Config(annotate=task, data=DataConfig(path="x"))).annotate
    answer = answer_of(prepared)
    assert isinstance(answer, Json)
    assert prepared.json_schema == Ticket.model_json_schema()
    assert [field.name for field in answer.fields] == ["topic", "score"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"input": None}, "annotate.input is not set: name a task"),
        ({"choice": ["a"], "regex": "a"}, "annotate.choice and annotate.regex: an answer has one form"),
        ({"pydantic": "Ticket"}, "annotate.pydantic=Ticket: must be written package.module:Class"),
        ({"pydantic": "no_such_module:Ticket"}, "cannot be imported (No module named 'no_such_module')"),
        ({"pydantic": "json:loads"}, "annotate.pydantic=json:loads: is no pydantic model"),
        ({"json_schema": "nowhere.json"}, "annotate.json_schema=nowhere.json: cannot be read"),
        ({"json_schema": [1]}, "annotate.json_schema=[1]: must be a mapping"),
        ({"examples": {"text": "a"}}, "annotate.examples must be a list"),
        ({"examples": [{"text": "a"}]}, "annotate.examples[0] has no answer"),
        ({"examples": [{"text": "a", "answer": "c"}], "choice": ["a"]}, "annotate.examples[0]: the answer 'c' is none of a"),
        ({"examples": [{"txt": "a", "answer": "a"}]}, "annotate.examples[0]: annotate.input fails on this row: 'text' is undefined"),
        ({"input": "{{ text"}, "annotate.input, line 1: unexpected end of template"),
        ({"input": "a\n{{ text }}: {{ Review Text }}"}, "line 2: expected token 'end of print statement', got 'Text'; if 'Review Text' is a column, write row['Review Text']"),
        ({"input": "a\r\rb {{ Review Text | upper }}"}, "; if 'Review Text' is a column, write row['Review Text']"),
        ({"instruction": "{% if %}"}, "annotate.instruction, line 1: "),
        ({"input": " "}, "annotate.input=: is empty"),
        ({"swap_labels": ["a", "b"], "choice": ["a", "b"]}, "annotate.swap_labels and data.swap_columns: give both"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_work_is_refused(task: dict[str, Any], message: str) -> None:
    with pytest.raises(BatchmixError) as caught:
        prompt(AnnotateConfig(**{"input": "{{ text }}", **task}), {"text": "b"})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["{{ text", "{% if %}", "{{ text if }}", "{{ text not }}", "{{ row['a b'] c }}"])
def test_other_mistakes_in_jinja_have_no_hint_of_columns(source: str) -> None:
    with pytest.raises(BatchmixError) as caught:
        RowTemplate(source)
    assert "is a column" not in str(caught.value)


def test_labels_that_are_swapped_must_be_choices() -> None:
    data = DataConfig(path="x", swap_columns=["a", "b"])
    task = AnnotateConfig(input="{{ a }}{{ b }}", choice=["A", "B"], swap_labels=["A", "C"])
    with pytest.raises(BatchmixError, match=r"annotate\.swap_labels=\['A', 'C'\]: must be two of annotate\.choice"):
        prepare(Config(annotate=task, data=data))


@pytest.mark.parametrize(
    "text",
    [
        "annotate: {choice: ['010', '1e5', \"yes\", 8, 0, -1, a, 2024-01-02]}",
        "annotate: {json_schema: {enum: ['yes', '010', true, False, 10, 0, 1.50, null]}}",
        "annotate: {json_schema: schema.yaml}",
        "annotate: 5",
        "",
    ],
)
def test_labels_that_are_what_they_seem_are_taken(text: str) -> None:
    assert misread_labels(text) is None


def test_labels_of_a_schema_file_are_what_they_seem(tmp_path: Path) -> None:
    path = tmp_path / "schema.yaml"
    path.write_text("properties: {code: {enum: [010, 011]}}")
    task = AnnotateConfig(input="{{ text }}", json_schema=str(path))
    with pytest.raises(
        BatchmixError, match=r"schema\.yaml: properties\.code\.enum\[0\] is 8 to YAML, not the text '010'"
    ):
        prompt(task, {"text": "b"})
    path.write_text("properties: {code: {enum: ['010', '011']}}")
    assert '{"enum": ["010", "011"]}' in prompt(
        AnnotateConfig(input="{{ text }}", instruction="Q", json_schema=str(path)), {"text": "b"}
    )


def test_a_required_name_that_is_no_property_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    part = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["cty"]}
    schema = {"type": "object", "properties": {"stars": {"type": "integer"}, "required": {"enum": ["yes", "no"]},
                                               "places": {"type": "array", "items": part}}, "required": ["star", "places"]}  # fmt: skip
    prompt(AnnotateConfig(input="{{ text }}", json_schema=schema), {"text": "b"})
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "annotate.json_schema.required names 'star', which is none of its properties; did you mean 'stars'?",
        "annotate.json_schema.properties.places.items.required names 'cty', which is none of its properties; did you mean 'city'?",
    ]
    caplog.clear()
    schema["required"], part["required"] = ["stars"], ["city"]
    prompt(AnnotateConfig(input="{{ text }}", json_schema=schema), {"text": "b"})
    assert not caplog.records


def test_a_template_beside_a_task_is_refused() -> None:
    with pytest.raises(BatchmixError, match=r"data\.template: a task makes the prompt"):
        prepare(Config(annotate=AnnotateConfig(input="x"), data=DataConfig(path="x", template="y")))


def test_a_stop_string_does_not_go_with_answers_of_a_form() -> None:
    """Guidance is made of the task, so what does not go with it is known only then."""
    task = AnnotateConfig(input="x", json_schema={"type": "integer"})
    with pytest.raises(BatchmixError, match=r"sampling\.stop does not go with sampling\.structured_outputs"):
        prepare(Config(annotate=task, data=DataConfig(path="x"), sampling=SamplingConfig(stop=["1"])))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("annotate: {input: x, choice: [a, yes]}", "task.yaml: annotate.choice[1] is True to YAML, not a text; put quotes around"),
        ("annotate: {input: x, choice: [1.50, 2]}", "task.yaml: annotate.choice[0] is 1.5 to YAML"),
        ("annotate: {input: x, choice: ['9', 010, 011]}", "task.yaml: annotate.choice[1] is 8 to YAML, not a text; put quotes around"),
        ("annotate: {input: x, choice: [1e5, a]}", "task.yaml: annotate.choice[0] is 100000.0 to YAML"),
        ("annotate: {input: x, choice: [a, 12:30]}", "task.yaml: annotate.choice[1] is 750 to YAML"),
        ("annotate: {input: x, json_schema: {enum: [yes, no]}}",
         "task.yaml: annotate.json_schema.enum[0] is True to YAML, not the text 'yes'; put quotes around"),
        ("annotate: {input: x, json_schema: {properties: {code: {anyOf: [{enum: [a, 007]}]}}}}",
         "task.yaml: annotate.json_schema.properties.code.anyOf[0].enum[1] is 7 to YAML, not the text '007'"),
        ("annotate: {input: x, json_schema: {properties: {on: {const: off}}}}", "properties.on.const is False to YAML, not the text 'off'"),
        ("annotate: {input: x, choice: {a: 1}}", "a mapping stands where a list belongs, which is written [a, b], or a list"),
        ("annotate: 5", "annotate=5: must be a group of keys, each with its value (in annotate/task.yaml)"),
    ],
)  # fmt: skip
def test_a_task_file_that_says_something_else_than_it_seems_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "task.yaml").write_text(text)
    assert main([str(tmp_path / "task.yaml"), "data.path=x.jsonl", "output.dir=out"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
