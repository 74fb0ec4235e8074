"""Texts into typed values: every kind of answer, and the Arrow types of JSON Schemas."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.annotate.answer import Choice, Invalid, Json, Pattern, Text
from batchmix.annotate.arrow_types import field_of
from batchmix.errors import BatchmixError

jsonschema = pytest.importorskip("jsonschema")  # of the `annotate` extra

LABELS = pa.dictionary(pa.int32(), pa.string())


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, pa.string()),
        ({"type": "integer"}, pa.int64()),
        ({"type": ["number", "null"]}, pa.float64()),
        ({"type": "boolean"}, pa.bool_()),
        ({"enum": ["a", "b"]}, LABELS),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}, LABELS),
        ({"const": "a"}, LABELS),
        ({"enum": [1, 2, None]}, pa.int64()),
        ({"enum": [1, 2.5]}, pa.float64()),
        ({"enum": [True]}, pa.bool_()),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, pa.list_(pa.string())),
        ({"type": "object", "properties": {"x": {"type": "number"}}}, pa.struct([("x", pa.float64())])),
        ({"$ref": "#/$defs/Mood"}, LABELS),
        ({"allOf": [{"$ref": "#/$defs/Mood"}]}, LABELS),
    ],
)  # fmt: skip
def test_types_of_columns(schema: Any, expected: pa.DataType) -> None:
    field = field_of("x", schema, {"$defs": {"Mood": {"enum": ["good", "bad"]}}})
    assert (field.type, field.as_json) == (expected, False)


@pytest.mark.parametrize(
    "schema",
    [{}, True, {"enum": ["a", 1]}, {"type": ["string", "integer"]}, {"type": "array"}, {"type": "object"},
     {"anyOf": [{"type": "string"}, {"type": "integer"}]}, {"$ref": "#/$defs/Node"}, {"$ref": "#/nowhere"},
     {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}}],
)  # fmt: skip
def test_what_has_no_type_is_kept_as_json(schema: Any) -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}
    field = field_of("x", schema, {"$defs": {"Node": node}})
    assert (field.type, field.as_json) == (pa.string(), True)
    assert field.column([{"a": "ä"}, None]).to_pylist() == ['{"a": "ä"}', None]


def schemas(depth: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas that have a typed column."""
    leaf = st.one_of(
        st.sampled_from([{"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}]),
        st.lists(st.text(max_size=5), min_size=1, max_size=3, unique=True).map(lambda values: {"enum": values}),
    )
    if not depth:
        return leaf
    inner = schemas(depth - 1)
    names = st.dictionaries(st.text(min_size=1, max_size=4), inner, min_size=1, max_size=3)
    return st.one_of(
        leaf,
        inner.map(lambda item: {"type": "array", "items": item}),
        names.map(lambda found: {"type": "object", "properties": found, "required": list(found)}),
    )


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "array":
        return st.lists(values(schema["items"]), max_size=3)
    if schema["type"] == "object":
        return st.fixed_dictionaries({name: values(part) for name, part in schema["properties"].items()})
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "string": st.text(max_size=8),
        "integer": st.integers(-(2**63), 2**63 - 1),
        "number": st.floats(allow_nan=False, allow_infinity=False),
        "boolean": st.booleans(),
    }
    return kinds[schema["type"]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_valid_answer_comes_back_from_its_columns(data: st.DataObject) -> None:
    schema = data.draw(schemas())
    value = data.draw(values(schema))
    answer = Json("label", schema)
    parsed = answer.parse(json.dumps(value))
    stored = {field.name: field.column([parsed[field.name]])[0].as_py() for field in answer.fields}
    assert stored == (value if schema.get("properties") else {"label": value})


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=40) | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists).map(json.dumps)
)
def test_a_text_is_parsed_or_refused_in_one_line(text: str) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for answer in (
        Choice("label", ["a", "b"]),
        Pattern("label", "[ab]+"),
        Json("label", schema),
        Json("label", {"type": "integer"}),
    ):
        try:
            parsed = answer.parse(text)
        except Invalid as error:
            reason = str(error)
        else:
            reason = "none"
            assert all(len(field.column([parsed[field.name]])) == 1 for field in answer.fields)
            if isinstance(answer, Json):
                jsonschema.validate(json.loads(text), answer.schema)
        assert reason.isprintable()
        assert len(reason) < 400


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"n": 99999999999999999999}', "n: "),
        ('{"n": "1"}', "$.n: '1' is not of type 'integer'"),
        ('{"n": NaN}', "NaN is no number"),
        ('{"n": 1', "is no JSON"),
        ('{"s": "\\ud800", "n": 1}', "s: "),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_json_that_has_no_place_in_a_column_is_no_answer(text: str, reason: str) -> None:
    answer = Json("label", {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}})
    with pytest.raises(Invalid) as caught:
        answer.parse(text)
    assert reason in str(caught.value)


def test_named_groups_of_a_pattern_are_columns() -> None:
    answer = Pattern("label", r"(?P<low>\d+)(-(?P<high>\d+))?")
    assert [field.name for field in answer.fields] == ["low", "high"]
    assert answer.parse(" 3-5\n") == {"low": "3", "high": "5"}
    assert answer.parse("3") == {"low": "3", "high": None}
    assert Pattern("year", r"\d{4}").parse("1999") == {"year": "1999"}


def test_choices_are_taken_by_the_letter() -> None:
    choice = Choice("label", ["yes", "no"])
    assert choice.parse(" yes\n") == {"label": "yes"}
    for text in ("Yes", "yes.", "", "yes no"):
        with pytest.raises(Invalid):
            choice.parse(text)


def test_booleans_of_yaml_are_named() -> None:
    with pytest.raises(Invalid, match="'true' is none of True, False; in YAML yes, no, on and off without quotes"):
        Choice("label", ["True", "False"]).parse("true")


def test_an_empty_text_is_no_answer() -> None:
    assert Text("summary").parse(" a ") == {"summary": "a"}
    with pytest.raises(Invalid):
        Text("summary").parse(" \n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice("label", []), "annotate.choice"),
        (lambda: Choice("label", ["a", "a"]), "annotate.choice"),
        (lambda: Choice("label", ["a "]), "annotate.choice"),
        (lambda: Pattern("label", "("), "annotate.regex=(: is no regular expression"),
        (lambda: Json("label", {"type": "text"}), "annotate.json_schema: is no JSON Schema: $.type"),
    ],
)
def test_a_form_that_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(BatchmixError) as caught:
        make()
    assert message in str(caught.value)
