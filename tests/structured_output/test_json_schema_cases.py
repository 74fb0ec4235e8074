"""JSON Schemas that were answered outside themselves: resolved as the jsonschema library resolves them, or refused by name."""

from __future__ import annotations

import contextlib
import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from guided_walks import accepts_on_host, automaton_of, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.structured_output.dfa import build_automaton
from batchmix.structured_output.json_schema import json_schema_grammar
from batchmix.structured_output.pattern import Unsupported

CASES = json.loads((Path(__file__).parent.parent / "fixtures" / "json_schema_cases.json").read_text())
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
DRAFT_4 = "http://json-schema.org/draft-04/schema#"


pytest.importorskip("py_mini_racer")  # of the `dev` extra, as jsonschema
JUDGE = importlib.import_module("schema_judge").Judge()
# What docs/guided.md says instead: these texts are valid, or may be, and the other way round with us.
IN_THE_DOCS = {"a name twice", "an other key", "keys in another order"}


def is_valid(schema: Any, text: str) -> bool:
    check = JUDGE.validator(schema)
    assert check is not None
    return bool(JUDGE.is_valid(check, text))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_case_has_its_verdict(case):
    if case["name"] in IN_THE_DOCS:
        pytest.skip("docs/guided.md says which texts are not written, and that names of an open object may come twice")
    verdict = "reject, or refuse the schema"
    with contextlib.suppress(Unsupported):
        grammar = json_schema_grammar(case["schema"])
        if grammar.rules:
            verdict = "accept" if accepts_on_host(case["schema"], case["text"]) else "reject"
        else:
            verdict = "accept" if build_automaton(grammar.pattern).has(case["text"]) else "reject"
    expected = "accept" if case["kind"] == "too large" else case["expected"]
    assert expected.startswith(verdict) or verdict.startswith(expected)


def test_members_that_may_be_left_out_share_what_follows_them():
    case = next(case for case in CASES if case["kind"] == "too large")
    assert len(automaton_of(case["schema"]).accepts) < 2_000


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([case["schema"] for case in CASES]), st.integers(0, 2**32))
def test_random_texts_of_the_cases_are_valid(schema, seed):
    try:
        automaton = automaton_of(schema)
    except (Unsupported, AssertionError):  # refused, or any value, which has no automaton
        return
    for text in texts(automaton, random.Random(seed), 5):
        assert is_valid(schema, text), (schema, text)


INNER_DOCUMENT = {
    "$id": "https://example.com/a", "type": "object", "properties": {"n": {"$ref": "#/$defs/N"}}, "required": ["n"],
    "$defs": {"N": {"enum": ["inner"]}},
}  # fmt: skip
RESOLVED = {
    "anchor": {"$defs": {"L": {"$anchor": "label", "enum": ["bug"]}}, "$ref": "#label"},
    "anchor of a document": {
        "$id": "http://x/root.json",
        "$ref": "other.json#label",
        "$defs": {"O": {"$id": "other.json", "$defs": {"L": {"$anchor": "label", "enum": ["bug"]}}}},
    },
    "dynamicAnchor as an anchor": {"$defs": {"L": {"$dynamicAnchor": "label", "enum": ["bug"]}}, "$ref": "#label"},
    "one anchor in two documents": {
        "$ref": "#label",
        "$defs": {
            "A": {"$anchor": "label", "$ref": "b"},
            "B": {"$id": "b", "$ref": "#label", "$defs": {"L": {"$anchor": "label", "enum": [1]}}},
        },
    },
    "draft 7's $id as an anchor": {
        "$schema": DRAFT_7,
        "definitions": {"L": {"$id": "#label", "enum": ["bug"]}},
        "allOf": [{"$ref": "#label"}],
    },
    "draft 4's id as an anchor": {
        "$schema": DRAFT_4,
        "definitions": {"L": {"id": "#label", "enum": ["bug"]}},
        "allOf": [{"$ref": "#label"}],
    },
    "pointer within a document": {
        "type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"],
        "$defs": {"N": {"enum": ["outer"]}, "A": INNER_DOCUMENT},
    },
    "pointer across a document": {
        "$ref": "#/$defs/A/properties/n", "$defs": {"N": {"enum": ["outer"]}, "A": INNER_DOCUMENT},
    },
    "relative address": {
        "$id": "http://x/y/root", "$ref": "z/item#/$defs/N",
        "$defs": {"A": {"$id": "z/", "$defs": {"I": {"$id": "item", "$defs": {"N": {"const": 3}}}}}},
    },
    "address twice relative": {
        "$id": "http://x/dir/root", "type": "array", "items": {"$ref": "part"}, "maxItems": 2,
        "$defs": {"P": {"$id": "part", "allOf": [{"$ref": "root#/$defs/N"}]}, "N": {"enum": [7]}},
    },
    "urn": {"$id": "urn:uuid:1", "$ref": "#/$defs/N", "$defs": {"N": {"const": 1}}},
    "draft 7's $id beside $ref": {
        "$schema": DRAFT_7,
        "type": "object", "properties": {"a": {"$id": "http://x/y", "$ref": "#/definitions/N"}}, "required": ["a"],
        "definitions": {"N": {"const": 1}},
    },
    "a property called $id": {
        "type": "object", "properties": {"$id": {"const": 1}, "b": {"$ref": "#/properties/$id"}}, "required": ["b"],
    },
    "an anchor in an enum": {"enum": [{"$anchor": "label", "$id": "http://x"}]},
    "percent in a pointer": {"$ref": "#/$defs/a%25b~1c", "$defs": {"a%b/c": {"const": 1}}},
    "draft 4's integers": {"$schema": DRAFT_4, "type": "integer", "enum": [1.0, 2]},
    "minLength above maxLength, optional": {
        "type": "object", "required": ["b"],
        "properties": {"a": {"type": "string", "minLength": 3, "maxLength": 1}, "b": {"const": 1}},
    },
    "enum of another type, optional": {"type": "object", "properties": {"a": {"enum": [1.5], "type": "integer"}}},
    "nothing of one of two": {"anyOf": [{"type": "integer", "minimum": 2, "maximum": 1}, {"const": 1}]},
    "equal texts of classes": {"type": "string", "pattern": r"^[^\s\d]\S\D\W.$"},
}  # fmt: skip


@pytest.mark.parametrize("name", RESOLVED)
def test_references_are_resolved_as_the_jsonschema_library_does(name):
    schema = RESOLVED[name]
    found = texts(automaton_of(schema), random.Random(0), 12)
    assert found
    for text in found:
        assert is_valid(schema, text), text


REFUSED = {
    "anchor that is not there": ({"$ref": "#nosuch"}, "'#nosuch' is not there: no schema has this anchor"),
    "anchor in draft 7": (
        {"$schema": DRAFT_7, "definitions": {"L": {"$anchor": "l", "const": 1}}, "allOf": [{"$ref": "#l"}]},
        "'#l' is not there",
    ),
    "anchor of another document": (
        {"$ref": "#l", "$defs": {"A": {"$id": "a", "$defs": {"L": {"$anchor": "l", "const": 1}}}}},
        "'#l' is not there",
    ),
    "id without draft 4": ({"$defs": {"L": {"id": "#l", "const": 1}}, "$ref": "#l"}, "'#l' is not there"),
    "another document": ({"$ref": "other.json"}, "only references within the schema"),
    "a document's own root": (
        {"$id": "http://x/y", "$ref": "http://x/z#/$defs/a", "$defs": {"a": {"const": 1}}},
        "only references within the schema",
    ),
    "anchor twice": (
        {"$ref": "#l", "$defs": {"A": {"$anchor": "l", "const": 1}, "B": {"$anchor": "l", "const": 2}}},
        "the anchor 'l', which another part has as well",
    ),
    "document twice": (
        {"$defs": {"A": {"$id": "a"}, "B": {"$id": "a"}}, "$ref": "a"},
        "which another part has as well",
    ),
    "id with a fragment": ({"$defs": {"A": {"$id": "#a", "const": 1}}, "$ref": "#a"}, "has a fragment"),
    "dynamicRef": (
        {"items": {"$dynamicRef": "#a"}, "$defs": {"b": {"$id": "b", "$dynamicAnchor": "a"}}, "$dynamicAnchor": "a"},
        "keyword '\\$dynamicRef'",
    ),
    "another draft": ({"$schema": "http://json-schema.org/draft-03/schema#", "type": "null"}, "/\\$schema is 'http"),
    "two drafts": ({"anyOf": [{"$schema": DRAFT_7, "type": "null"}]}, "is of another draft than the whole schema"),
    "minLength above maxLength": ({"type": "string", "minLength": 5, "maxLength": 2}, "no text fits"),
    "the same, required": (
        {"type": "object", "properties": {"a": {"type": "string", "minLength": 3, "maxLength": 1}}, "required": ["a"]},
        "no text fits",
    ),
    "minItems above maxItems": ({"type": "array", "items": {"const": 1}, "minItems": 3, "maxItems": 1}, "no text fits"),
    "minimum above maximum": ({"type": "number", "minimum": 1.5, "maximum": 1.25}, "no text fits"),
    "exclusive bounds that meet": ({"type": "number", "minimum": 1, "exclusiveMaximum": 1}, "no text fits"),
    "no integer between": ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "no text fits"),
    "empty enum": ({"enum": []}, "no text fits"),
    "constant of another type": ({"const": 1, "type": "string"}, "no text fits"),
    "constant outside its enum": ({"const": 1, "enum": [2]}, "no text fits"),
    "required and forbidden": (
        {"type": "object", "properties": {"a": {"const": 1}}, "required": ["b"], "additionalProperties": False},
        "no text fits",
    ),
    "minProperties": ({"type": "object", "properties": {"a": {"const": 1}}, "minProperties": 2}, "no text fits"),
    "constants within constants": (
        {"oneOf": [{"const": [{"a": 1}]}, {"const": [{"a": 1.0}]}]},
        "no text fits",
    ),
    "infinite constants": ({"const": float("inf")}, "no JSON value|must be a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_value_or_no_meaning_is_named(name):
    schema, reason = REFUSED[name]
    with pytest.raises(Unsupported, match=reason):
        automaton_of(schema)


def test_constants_that_only_look_alike_are_apart():
    found = set(
        texts(automaton_of({"oneOf": [{"const": [1]}, {"const": [True]}, {"const": ["1"]}]}), random.Random(0), 60)
    )
    assert found == {"[1]", "[true]", '["1"]'}


def test_recursion_through_an_anchor_and_a_document():
    pytest.importorskip("llguidance")
    schema = {
        "$ref": "#node",
        "$defs": {
            "N": {"$anchor": "node", "type": "array", "items": {"$ref": "list"}},
            "L": {"$id": "list", "type": "array", "items": {"$ref": "#"}, "maxItems": 1},
        },
    }
    for text, valid in [("[]", True), ("[[]]", True), ("[[[[[]]]]]", True), ("[[[], []]]", False), ("[1]", False)]:
        assert is_valid(schema, text) == valid
        assert accepts_on_host(schema, text) == valid, text
