"""JSON Schemas as automata, against the jsonschema library."""

from __future__ import annotations

import contextlib
import json
import random
import time
from typing import Any

import pytest
from guided_strategies import SCHEMAS
from guided_walks import automaton_of, texts
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.structured_output.compile import GrammarCompiler
from batchmix.structured_output.dfa import build_automaton
from batchmix.structured_output.json_schema import json_schema_grammar
from batchmix.structured_output.pattern import Unsupported

jsonschema = pytest.importorskip("jsonschema")  # of the `annotate` extra

Validator = jsonschema.Draft202012Validator


def validator(schema: Any) -> jsonschema.Draft202012Validator:
    Validator.check_schema(schema)
    return Validator(schema, format_checker=Validator.FORMAT_CHECKER)


@settings(max_examples=12, deadline=None)
@given(SCHEMAS, st.integers(0, 2**32))
def test_every_text_is_a_valid_instance(schema, seed):
    check = validator(schema)
    try:
        automaton = automaton_of(schema)
    except Unsupported as error:
        assume("no text fits" not in str(error))  # bounds that leave nothing
        raise
    for text in texts(automaton, random.Random(seed), 10):
        value = json.loads(text)
        assert check.is_valid(value), (schema, text)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["integer", "number"]),
    st.dictionaries(
        st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
        st.one_of(st.integers(-130, 130), st.floats(-3, 3).map(lambda x: round(x, 3)), st.just(0)),
    ),
)
def test_bounds_leave_out_no_number(kind, bounds):
    schema = {"type": kind, **bounds}
    check = validator(schema)
    try:
        automaton = automaton_of(schema)
    except Unsupported:
        automaton = None
    near = [format(value + step, "f") for value in bounds.values() for step in (-1, -0.001, 0, 0.001, 1)]
    for text in ["0", "1", "-1", "10", "0.5", "-0.5", "-2.75", "100", "-129", *near]:
        text = text.rstrip("0").rstrip(".") if "." in text else text
        if (kind == "integer" and "." in text) or text in ("", "-") or len(text.partition(".")[2]) > 6:
            continue
        state = 0 if automaton is not None else -1
        for byte in text.encode():
            state = int(automaton.goto[state, byte]) if automaton is not None and state >= 0 else -1
        accepted = automaton is not None and state >= 0 and bool(automaton.accepts[state])
        assert accepted == check.is_valid(json.loads(text)), (schema, text)


@pytest.mark.parametrize(
    ("schema", "feature"),
    [
        ({"type": "integer", "multipleOf": 1009}, "/multipleOf is 1009, whose multiples are too many"),
        ({"type": "integer", "multipleOf": 0}, "/multipleOf must be above 0"),
        (
            {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
            "the keyword 'uniqueItems'.*leave it out",
        ),
        ({"type": "array", "items": {"type": "null"}, "contains": {}}, "the keyword 'contains'"),
        ({"not": {}}, "no text fits"),
        ({"type": "array", "items": {"const": 1}, "not": {"uniqueItems": False}}, "no text fits"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "no text fits"),
        ({"$ref": "http://x/y"}, "only references within the schema"),
        ({"$ref": "#/$defs/none"}, "is not there"),
        ({"type": "string", "pattern": "(?<=a)"}, "the pattern .*look-behind"),
        ({"type": "string", "pattern": r"(a)\1"}, "the pattern .*a back-reference"),
        (
            {"type": "string", "pattern": r"\p{Script=Greek}"},
            "the pattern .*the property 'Script=Greek'; supported are",
        ),
        ({"properties": {"a": {"pattern": "("}}}, r"^/properties/a has the pattern '\(': has a \( without \)"),
        ({"type": "text"}, "has type 'text'"),
        ({"type": "object", "required": True}, "/required must be a list of names"),
        ({"type": "string", "maxLength": 1_000_000}, "the automaton is too large"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no text fits: an enum is empty, bounds exclude each other"),
        ([1], "is no schema"),
        ({"type": {}}, "has type {}"),
        ({"type": "object", "properties": {1: {"const": 1}}}, "texts as names"),
    ],
)
def test_what_cannot_be_kept_is_named(schema, feature):
    with pytest.raises(Unsupported, match=feature):
        automaton_of(schema)


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3), st.sampled_from(["string", "array", "#"])),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(["type", "enum", "const", "items", "properties", "required", "minLength", "maximum", "$ref",
                                 "anyOf", "oneOf", "allOf", "pattern", "format", "prefixItems", "minItems"]),
                inner, max_size=3,
            ),
        ),
        max_leaves=8,
    )
)  # fmt: skip
def test_whatever_data_holds_is_an_automaton_or_a_line(schema):
    with contextlib.suppress(Unsupported):
        grammar = json_schema_grammar(schema)
        if not grammar.rules:
            build_automaton(grammar.pattern)


def doubling(depth: int) -> dict[str, Any]:
    """Definitions that each stand twice in the one before."""
    twice = {f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2, "items": False}
             for i in range(depth)}  # fmt: skip
    return {"$defs": {**twice, f"d{depth}": {"type": "boolean"}}, "$ref": "#/$defs/d0"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "object"}]}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "minItems": 2}
    return schema


@pytest.mark.parametrize("schema", [doubling(15), doubling(30), nested(30)], ids=["doubling", "deep", "nested"])
def test_small_schemas_of_large_patterns_are_answered_at_once(schema):
    """Each would take minutes, or all of the memory, if it was written out."""
    pytest.importorskip("llguidance")
    grammars = GrammarCompiler(
        [b"", *(bytes([byte]) for byte in range(256))], drops_leading_space=False, eos_token_ids=[0]
    )
    started = time.process_time()
    with contextlib.suppress(Unsupported):
        grammars.get(SamplingConfig(structured_outputs=StructuredOutputs(json=schema)))
    assert time.process_time() - started < 10


def test_one_of_constants_and_types_is_any_of():
    schema = {"oneOf": [{"const": "a"}, {"enum": ["b", None]}, {"type": "integer", "maximum": 3}]}
    found = set(texts(automaton_of(schema), random.Random(0), 60))
    assert {'"a"', '"b"', "null"} < found


def test_what_pydantic_writes():
    from pydantic import BaseModel, Field

    class Entity(BaseModel):
        name: str = Field(max_length=8, description="as it stands in the text")
        kind: str | None = None

    class Answer(BaseModel):
        entities: list[Entity] = Field(max_length=2)
        score: float = Field(ge=0, le=1)

    for text in texts(automaton_of(Answer.model_json_schema()), random.Random(1), 40):
        Answer.model_validate_json(text)
