"""What the samples of a row say together, and whole runs of the built-in model with typed columns."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchmix.annotate.answer import Choice, Json
from batchmix.annotate.columns import AnnotationColumns
from batchmix.annotate.config import AnnotateConfig
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.output.columns import OutputColumns
from batchmix.output.config import OutputConfig
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig, StructuredOutputs

pytest.importorskip("jsonschema")  # of the `annotate` extra

TICKETS = Path(__file__).parents[2] / "examples/support_tickets.jsonl"


def samples(row: int, texts: list[str], logprob: float | None = None) -> list[Completion]:
    owner = Prompt(row, str(row), {}, [1], SamplingConfig(n=len(texts)))
    return [
        Completion(owner, i, [5], "stop", num_tokens=1, cumulative_logprob=logprob, text=text)
        for i, text in enumerate(texts)
    ]


def records(columns: AnnotationColumns, completions: list[Completion]) -> list[dict[str, Any]]:
    return pa.Table.from_arrays(columns.arrays(completions), schema=columns.schema).to_pylist()


def test_the_majority_of_the_valid_samples() -> None:
    columns = AnnotationColumns(Choice("label", ["a", "b"]), None)
    found = records(columns, samples(0, ["b", "a", "?", "a"], math.log(0.25)))
    assert [record["label"] for record in found] == ["b", "a", None, "a"]
    assert [record["majority"] for record in found] == [False, True, False, False]
    assert [record["confidence"] for record in found] == [0.25, 0.25, None, 0.25]
    assert {record["agreement"] for record in found} == {2 / 3}
    expected = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert all(record["entropy"] == pytest.approx(expected) for record in found)
    assert [record["invalid"] for record in found] == [None, None, "the answer '?' is none of a, b", None]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"}, "mood": {"enum": ["gut", "schön"]}, "urgent": {"type": "boolean"},
        "parts": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "mood"],
}  # fmt: skip


def test_the_confidence_of_an_object_is_that_of_its_classes() -> None:
    pieces = ['{"na', 'me": "', 'Ü, \\"', "mood", '", "mo', 'od": "s', "ch", "ö", 'n", "', 'urgent": ', "tr", "ue}"]
    text = "".join(pieces)
    (sample,) = samples(0, [text])
    sample.token_ends = [len("".join(pieces[: place + 1]).encode()) for place in range(len(pieces))]
    sample.guided_logprobs = [-(2.0**-place) for place in range(len(pieces))]
    (found,) = records(AnnotationColumns(Json("label", SCHEMA), None), [sample])
    assert found["mood"] == "schön"
    of_mood, of_urgent = (5, 6, 7, 8), (10, 11)
    assert found["confidence"] == pytest.approx(math.exp(-sum(2.0**-place for place in (*of_mood, *of_urgent))))


@pytest.mark.parametrize(
    "answer", [Json("label", {"type": "array", "items": {"type": "string"}}), Choice("label", ['["a"]'])]
)
def test_the_confidence_of_any_other_answer_is_that_of_its_tokens(answer: Any) -> None:
    (sample,) = samples(0, ['["a"]'])
    sample.token_ends, sample.guided_logprobs = [3, 5, 6], [-0.5, -0.25, -0.125]  # the last token ends the text
    (found,) = records(AnnotationColumns(answer, None), [sample])
    assert found["confidence"] == pytest.approx(math.exp(-0.875))


def test_a_scored_choice_of_a_row_may_have_white_space_around_it() -> None:
    (sample,) = samples(0, ["yes "])
    outputs = StructuredOutputs(choice=["no", "yes "], score_choices=True)
    sample.prompt.sampling = replace(sample.prompt.sampling, structured_outputs=outputs)
    sample.choice_probabilities = [0.25, 0.75]
    (found,) = records(AnnotationColumns(Choice("label", ["yes", "no"]), None), [sample])
    assert (found["label"], found["confidence"]) == ("yes", 0.75)


@given(
    st.text(),
    st.sampled_from(["gut", "schön"]),
    st.one_of(st.none(), st.booleans()),
    st.lists(st.text(max_size=3), max_size=3),
)
def test_decisions_are_the_values_of_the_classes(name: str, mood: str, urgent: bool | None, parts: list[str]) -> None:
    value = {"name": name, "mood": mood, **({} if urgent is None else {"urgent": urgent}), "parts": parts}
    for written in ({}, {"indent": 1}, {"separators": (",", ":")}):  # a row may have a grammar of its own
        text = json.dumps(value, ensure_ascii=False, **written)
        spans = Json("label", SCHEMA).decisions(text)
        found = [json.loads(text[low:high]) for low, high in spans]
        assert found == ([mood] if urgent is None else [mood, urgent])


def test_the_confidence_of_a_number_counts_that_it_ends() -> None:
    schema = {"type": "object", "properties": {"score": {"enum": [1, 10]}, "text": {"type": "string"}}}
    (sample,) = samples(0, ['{"score": 1, "text": ""}'])
    sample.token_ends, sample.guided_logprobs = [10, 11, 14, 24, 25], [0.0, -0.5, -0.25, -0.125, 0.0]
    (found,) = records(AnnotationColumns(Json("label", schema), None), [sample])
    assert found["confidence"] == pytest.approx(math.exp(-0.75))


def test_a_row_without_a_valid_sample_and_one_that_could_not_run() -> None:
    columns = AnnotationColumns(Choice("label", ["a", "b"]), None)
    broken = Prompt(1, "1", {}, [], SamplingConfig(n=2), error="no prompt")
    found = records(columns, samples(0, ["?", "!"]) + [Completion.failed(broken, "no prompt", i) for i in range(2)])
    assert [record["majority"] for record in found] == [True, False, True, False]
    assert {(record["label"], record["agreement"], record["entropy"]) for record in found} == {(None, None, None)}
    assert [record["invalid"] is None for record in found] == [False, False, True, True]


def test_a_text_that_was_cut_off_says_so() -> None:
    columns = AnnotationColumns(Json("label", {"type": "integer"}), None)
    completion = samples(0, ["1"])[0]
    completion.text, completion.finish_reason = "", "length"
    assert records(columns, [completion])[0]["invalid"].startswith("cut off at sampling.max_tokens: ")


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", "x"]), min_size=1, max_size=6), min_size=1, max_size=5))
def test_votes_against_a_count(rows: list[list[str]]) -> None:
    columns = AnnotationColumns(Choice("label", ["a", "b", "c"]), None)
    completions = [sample for row, texts in enumerate(rows) for sample in samples(row, texts)]
    found = iter(records(columns, completions))
    for texts in rows:
        of_row = [next(found) for _ in texts]
        assert sum(record["majority"] for record in of_row) == 1
        votes = Counter(text for text in texts if text != "x")
        winner = next(record for record in of_row if record["majority"])
        if votes:
            assert votes[winner["label"]] == max(votes.values())
            assert winner["agreement"] == votes[winner["label"]] / votes.total()
        else:
            assert winner["label"] is None


def test_swapped_samples_are_read_backwards_and_must_agree() -> None:
    columns = AnnotationColumns(Choice("label", ["A", "B", "tie"]), ["A", "B"])
    agreeing = samples(0, ["A", "B"])  # both mean the first column's answer
    by_place = samples(1, ["A", "A"])
    found = records(columns, agreeing + by_place + samples(2, ["tie", "tie"]) + samples(3, ["A", "?"]))
    assert [record["label"] for record in found] == ["A", "A", "A", "B", "tie", "tie", "A", None]
    assert [record["consistent"] for record in found] == ["A", "A", None, None, "tie", "tie", None, None]
    assert [record["agreement"] for record in found] == [1, 1, 0.5, 0.5, 1, 1, 1, 1]


def test_parts_of_every_labels_share_one_dictionary() -> None:
    columns = OutputColumns(pa.schema([]), token_ids=False, logprobs=False,
                            annotations=AnnotationColumns(Choice("label", ["a", "b", "c"]), None))  # fmt: skip
    tables = [columns.table(samples(0, [text])) for text in ("c", "a")]
    assert [table["label"].chunk(0).dictionary.to_pylist() for table in tables] == [["a", "b", "c"]] * 2


@pytest.mark.parametrize("name", ["row", "error", "confidence", "generated_text"])
def test_a_field_that_is_called_as_a_column_of_ours_is_refused(name: str) -> None:
    with pytest.raises(BatchmixError, match=f"is called '{name}'"):
        OutputColumns(pa.schema([]), token_ids=False, logprobs=False,
                      annotations=AnnotationColumns(Choice(name, ["a"]), None))  # fmt: skip


def run(
    folder: Path, rows: list[dict[str, Any]], task: AnnotateConfig, data: dict[str, Any], **sampling: Any
) -> ds.Dataset:
    from batchmix.annotation import annotate

    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    annotate(Config(annotate=task, data=DataConfig(path=str(path), **data), output=OutputConfig(dir=str(folder / "out")),
                    sampling=SamplingConfig(**{"temperature": 0.0, "max_tokens": 4, **sampling})))  # fmt: skip
    return ds.dataset(folder / "out", format="arrow")


@pytest.mark.parametrize("logprobs", [None, pytest.param(0, marks=pytest.mark.slow)], ids=["scored", "decoded"])
def test_both_orders_of_a_row_are_prompted_and_come_out_once(logprobs: int | None, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": f"first {i}", "b": f"second, {'longer ' * i}"} for i in range(6)]
    rows[3]["b"] = None  # cannot be printed: an error row, once
    rows[4]["sampling"] = {"n": 1}
    task = AnnotateConfig(input="{{ a }} or {{ b }}", choice=["A", "B"], swap_labels=["A", "B"])
    found = run(tmp_path, rows, task, {"swap_columns": ["a", "b"]}, n=4, logprobs=logprobs).to_table().sort_by(
        [("row", "ascending"), ("sample_index", "ascending")])  # fmt: skip
    keys = list(zip(found["row"].to_pylist(), found["sample_index"].to_pylist(), strict=True))
    assert keys == [(row, sample) for row in range(6) for sample in range(1 if row == 4 else 4)]
    errors = {record["row"]: record["error"] for record in found.to_pylist() if record["error"]}
    assert errors[3].startswith("data.template fails")
    assert errors[4] == "the row's own sampling.n is 1, and data.swap_columns needs a sample for each order"
    assert set(errors) == {3, 4}
    for flipped in (False, True):  # the same prompts as rows of their own
        plain = tmp_path / f"flipped-{flipped}"
        plain.mkdir()
        order = [{"a": row["b"], "b": row["a"]} if flipped else row for row in rows[:3]]
        once = AnnotateConfig(input=task.input, choice=task.choice)
        expected = run(plain, order, once, {}, logprobs=logprobs).to_table().sort_by("row").to_pylist()
        for record in found.to_pylist():
            if record["row"] < 3 and record["sample_index"] % 2 == flipped:
                alone = expected[record["row"]]
                assert record["generated_text"] == alone["generated_text"]
                assert record["confidence"] == pytest.approx(alone["confidence"])
                assert (record["label"] == alone["label"]) != flipped
    assert found["a"].to_pylist()[:4] == ["first 0"] * 4


@pytest.mark.parametrize(
    ("names", "n", "template", "message"),
    [
        (["a"], 2, "{{ a }}{{ b }}", "must be two columns"),
        (["a", "a"], 2, "{{ a }}{{ b }}", "must be two columns"),
        (["a", "b"], 2, "{{ a }}", "needs a data.template that names both"),
        (["a", "b"], 2, None, "needs a data.template that names both"),
        (["a", "b"], 1, "{{ a }}{{ b }}", "needs sampling.n of at least 2"),
    ],
)
def test_swapping_that_cannot_work_is_refused(names: list[str], n: int, template: str | None, message: str) -> None:
    from batchmix.prompts.prompt import PromptBuilder

    data = DataConfig(path="x", template=template, swap_columns=names)
    with pytest.raises(BatchmixError, match=message):
        PromptBuilder(data, SamplingConfig(n=n), None, max_model_len=100, vocab_size=100)


@pytest.mark.slow  # a model answers 200 messages
@pytest.mark.parametrize("form", ["arrow", "jsonl"])
def test_a_run_that_went_on_halfway_has_the_columns_of_one_run_at_once(
    form: str, tmp_path: Path, batchmix: Any
) -> None:
    arguments = ("annotate", "tickets", f"data.path={TICKETS}", "data.limit=30", f"output.format={form}", "sampling.n=2",
                 "sampling.temperature=0.7", "output.order=input", "engine.max_num_seqs=16")  # fmt: skip
    whole = batchmix(*arguments, "output.dir=whole")
    assert whole.returncode == 0, whole.stderr
    # Half of it first, as the rows that a kill leaves committed: limit is free to grow.
    half = batchmix(*arguments, "output.dir=half", "data.limit=14")
    assert half.returncode == 0, half.stderr
    rest = batchmix(*arguments, "output.dir=half")
    assert rest.returncode == 0, rest.stderr
    half_rows, rows = (ds.dataset(tmp_path / name, format="json" if form == "jsonl" else form).to_table().to_pylist()
                       for name in ("half", "whole"))  # fmt: skip
    assert half_rows == rows
    assert len(rows) == 60
    changed = batchmix(*arguments, "output.dir=half", "annotate.json_schema.properties.urgent={type: string}")
    assert changed.returncode == 1
    assert "annotate.json_schema was" in changed.stderr
