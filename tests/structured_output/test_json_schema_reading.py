"""Keywords of JSON Schemas, each alone and beside others: what is written, what is not, and all of it valid."""

from __future__ import annotations

import importlib
import json
import logging
import random
from typing import Any

import pytest
from guided_walks import accepts_on_host, texts

from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.structured_output.compile import GrammarCompiler
from batchmix.structured_output.dfa import build_automaton
from batchmix.structured_output.host_grammar import HostGrammar
from batchmix.structured_output.json_schema import json_schema_grammar

pytest.importorskip("py_mini_racer")  # of the `dev` extra, as jsonschema
JUDGE = importlib.import_module("schema_judge").Judge()
DRAFT_4, DRAFT_7 = "http://json-schema.org/draft-04/schema#", "http://json-schema.org/draft-07/schema#"
A_B = {"a": {"type": "string"}, "b": {"type": "integer"}}
READ: dict[str, tuple[Any, list[str], list[str]]] = {  # a schema, texts of it, and others
    "type inferred": ({"minLength": 1}, ['"a"'], ['""', "1"]),
    "type inferred of two": ({"minLength": 1, "minimum": 3}, ['"a"', "3"], ['""', "2", "null"]),
    "type inferred within anyOf": ({"anyOf": [{"minimum": 3}, {"maxItems": 0}]}, ["3", "[]"], ["2"]),
    "keyword of another type": ({"type": "integer", "minLength": 1, "properties": A_B}, ["1"], ['"a"', "{}"]),
    "unknown format and pattern": ({"type": "string", "format": "slug", "pattern": "^a+$"}, ['"aa"'], ['"b"']),
    "format and pattern": ({"format": "date", "pattern": "^2024"}, ['"2024-02-29"'], ['"2023-01-01"', '"2024-02-30"']),
    "format and lengths": ({"format": "email", "maxLength": 6}, ['"a@b.cd"'], ['"ab@b.cde"']),
    "two patterns": ({"allOf": [{"pattern": "^a"}, {"pattern": "z$"}]}, ['"az"', '"a\\nz"'], ['"a"', '"za"']),
    "pattern not": ({"type": "string", "not": {"pattern": "a"}, "maxLength": 2}, ['"bc"'], ['"ba"', '"bcd"']),
    "schema order": ({"properties": A_B}, ['{"a": "", "b": 1}'], ['{"b": 1, "a": ""}']),
    "additional beside properties": (
        {"properties": A_B, "additionalProperties": {"type": "null"}},
        ['{"a": "", "c": null}', '{"x": null, "y": null}'], ['{"a": null}', '{"b": 1, "a": ""}', '{"c": 1}'],
    ),
    "required beyond properties": (
        {"properties": A_B, "required": ["c"], "additionalProperties": {"type": "null"}},
        ['{"a": "", "c": null}', '{"c": null, "d": null}'], ["{}", '{"c": null, "c": null}'],
    ),
    "siblings of $ref": (
        {"$defs": {"o": {"properties": A_B}}, "$ref": "#/$defs/o", "required": ["a"], "properties": {"b": {"minimum": 3}}},
        ['{"b": 3, "a": ""}'], ['{"b": 2, "a": ""}', '{"b": 3}'],
    ),
    "siblings of anyOf": (
        {"type": "object", "properties": A_B, "anyOf": [{"required": ["a"]}, {"required": ["b"]}], "maxProperties": 1},
        ['{"a": ""}', '{"b": 1}'], ["{}", '{"a": "", "b": 1}'],
    ),
    "allOf of three": (
        {"allOf": [{"properties": {"a": {"minimum": 1}}}, {"properties": {"a": {"maximum": 3}}}, {"required": ["a"]}],
         "properties": {"a": {"type": "integer"}}},
        ['{"a": 1}', '{"a": 3}'], ["{}", '{"a": 4}', '{"a": 1.5}'],
    ),
    "anyOf within allOf": (
        {"allOf": [{"anyOf": [{"const": 1}, {"const": 2}]}, {"anyOf": [{"const": 2}, {"const": 3}]}]}, ["2"], ["1", "3"],
    ),
    "patternProperties beside properties": (
        {"properties": A_B, "patternProperties": {"^x": {"type": "null"}}, "additionalProperties": False},
        ['{"a": "", "x1": null}', '{"x": null, "xy": null}'], ['{"x": 1}', '{"y": null}', '{"a": null}'],
    ),
    "patternProperties that match a property": (
        {"properties": {"ab": {"type": "integer"}}, "patternProperties": {"^a": {"minimum": 3}, "b$": {"maximum": 5}}},
        ['{"ab": 4}', '{"a": 3}'], ['{"ab": 2}', '{"ab": 6}', '{"a": 2}'],
    ),
    "patternProperties of few names": (
        {"patternProperties": {"^(lo|hi)$": {"type": "null"}}, "additionalProperties": False},
        ["{}", '{"hi": null, "lo": null}'], ['{"lo": null, "lo": null}', '{"mid": null}'],
    ),
    "propertyNames": (
        {"propertyNames": {"pattern": "^[a-z]$"}, "additionalProperties": {"type": "null"}}, ['{"q": null}'], ['{"Q": null}'],
    ),
    "propertyNames of an enum": (
        {"propertyNames": {"enum": ["x", "y"]}, "additionalProperties": {"type": "null"}},
        ['{"x": null, "y": null}'], ['{"x": null, "x": null}', '{"z": null}'],
    ),
    "propertyNames beside properties": ({"properties": A_B, "propertyNames": {"maxLength": 0}}, ["{}"], ['{"a": ""}']),
    "minProperties": ({"properties": A_B, "minProperties": 2}, ['{"a": "", "b": 1}'], ["{}", '{"a": ""}']),
    "minProperties of open names": (
        {"additionalProperties": {"type": "null"}, "minProperties": 1, "maxProperties": 2},
        ['{"a": null}', '{"a": null, "b": null}'], ["{}", '{"a": null, "b": null, "c": null}'],
    ),
    "maxProperties beside required": (
        {"properties": {**A_B, "c": {}, "d": {"const": 1}}, "required": ["d"], "maxProperties": 2},
        ['{"a": "", "d": 1}', '{"d": 1}'], ['{"a": "", "b": 1, "d": 1}', '{"a": ""}'],
    ),
    "dependencies of names": (
        {"$schema": DRAFT_7, "properties": A_B, "dependencies": {"a": ["b"]}, "maxProperties": 2},
        ["{}", '{"b": 1}', '{"a": "", "b": 1}'], ['{"a": ""}'],
    ),
    "dependencies of a schema": (
        {"properties": A_B, "dependentSchemas": {"a": {"required": ["b"], "properties": {"b": {"minimum": 5}}}}},
        ['{"b": 1}', '{"a": "", "b": 5}'], ['{"a": "", "b": 1}', '{"a": ""}'],
    ),
    "tuple of draft 7": (
        {"$schema": DRAFT_7, "items": [{"const": 1}, {"const": 2}], "additionalItems": {"const": 3}, "minItems": 1},
        ["[1]", "[1, 2]", "[1, 2, 3, 3]"], ["[]", "[2]", "[1, 2, 4]"],
    ),
    "draft 4's bounds": (
        {"$schema": DRAFT_4, "type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 2, "exclusiveMaximum": False},
        ["1", "2"], ["0", "3"],
    ),
    "multipleOf beside bounds": ({"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 22}, ["14", "21"], ["7", "15", "28"]),
    "two multiples": ({"type": "integer", "allOf": [{"multipleOf": 4}, {"multipleOf": 6}]}, ["12", "-24"], ["4", "6", "18"]),
    "uniqueItems of an enum": (
        {"items": {"enum": ["a", "b", 1]}, "uniqueItems": True, "minItems": 2},
        ['["b", "a"]', '["a", 1, "b"]'], ['["a"]', '["a", "a"]', '["a", 1, 1.0]'],
    ),
    "uniqueItems of small integers": (
        {"items": {"type": "integer", "minimum": -1, "maximum": 1}, "uniqueItems": True}, ["[1, 0, -1]"], ["[0, 0]", "[2]"],
    ),
    "uniqueItems of many": (
        {"items": {"enum": list("abcdefgh")}, "uniqueItems": True, "maxItems": 2}, ['["a", "h"]'], ['["b", "b"]', '["a", "b", "c"]'],
    ),
    "not of a constant": ({"enum": [1, 2, 3], "not": {"const": 2}}, ["1", "3"], ["2"]),
    "not of required": ({"properties": A_B, "not": {"required": ["a", "b"]}}, ['{"a": ""}', '{"b": 1}', "{}"], ['{"a": "", "b": 1}']),
    "not of a type": ({"type": ["integer", "string"], "not": {"type": "string"}}, ["1"], ['"a"']),
    "if, then and else": (
        {"properties": {"k": {"enum": ["x", "y"]}, "v": {"type": "integer"}}, "required": ["k", "v"],
         "if": {"properties": {"k": {"const": "x"}}}, "then": {"properties": {"v": {"minimum": 5}}},
         "else": {"properties": {"v": {"maximum": 0}}}},
        ['{"k": "x", "v": 5}', '{"k": "y", "v": 0}'], ['{"k": "x", "v": 0}', '{"k": "y", "v": 5}'],
    ),
    "oneOf that overlaps": (
        {"type": "object", "properties": A_B, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        ['{"a": ""}', '{"b": 1}'], ["{}", '{"a": "", "b": 1}'],
    ),
    "oneOf of numbers": ({"oneOf": [{"type": "integer"}, {"minimum": 2, "type": "number"}]}, ["1", "2.5"], ["3", "1.5"]),
    "oneOf beside type": ({"type": "string", "oneOf": [{"maxLength": 2}, {"minLength": 2}]}, ['"a"', '"abc"'], ['"ab"']),
    "unevaluatedProperties": (
        {"allOf": [{"properties": A_B}], "properties": {"c": {"const": 1}}, "unevaluatedProperties": False},
        ['{"c": 1, "a": "", "b": 1}'], ['{"d": 1}'],
    ),
    "enum beside limits": ({"enum": ["a", "bb", 3, None, [1, 2]], "minLength": 2, "maxItems": 1}, ['"bb"', "3", "null"], ['"a"', "[1, 2]"]),
    "const of equal numbers": ({"allOf": [{"const": [1.0, {"a": 2}]}, {"enum": [[1, {"a": 2.0}], 3]}]}, ['[1.0, {"a": 2}]'], ["3"]),
    "bounds of any size": (
        {"type": "integer", "minimum": -(10**30), "maximum": 10**30}, [str(10**30), str(-(10**30))], [str(10**30 + 1)],
    ),
    "digits and exponents": ({"type": "number"}, ["1643723400", "0.12345678901234567", "-1e-7", "2.5E+10"], ["01", "1.", ".5"]),
    "bounds and exponents": ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, ["1e-9", "1", "0.5"], ["0", "1e1", "0.0", "1.5e0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_keyword_is_read_as_validators_read_it(name):
    schema, written, others = READ[name]
    check = JUDGE.validator(schema)
    grammar = json_schema_grammar(schema)
    if grammar.rules:
        assert [text for text in written if not accepts_on_host(schema, text)] == []
        assert [text for text in others if accepts_on_host(schema, text)] == []
    else:
        automaton = build_automaton(grammar.pattern)
        assert [text for text in written if not automaton.has(text)] == []
        assert [text for text in others if automaton.has(text)] == []
        written = [*written, *texts(automaton, random.Random(name), 40)]
    assert [text for text in written if not JUDGE.is_valid(check, text)] == []


ON_THE_HOST = [
    name
    for name, (schema, _, _) in READ.items()
    if not any(word in json.dumps(schema) for word in ("unevaluated", "$ref", "$schema", 'allOf": [{"multipleOf'))
]


@pytest.mark.parametrize("name", ON_THE_HOST)
def test_llguidance_reads_our_grammars_as_tables_do(name):
    pytest.importorskip("llguidance")
    schema, written, others = READ[name]
    schema = {"anyOf": [{"properties": {"deeper": {"$ref": "#"}}, "required": ["deeper"]}, schema]}
    assert [text for text in written if not accepts_on_host(schema, text)] == []
    assert [text for text in others if accepts_on_host(schema, text)] == []


def test_what_is_too_large_for_us_goes_to_llguidance_with_our_patterns():
    pytest.importorskip("llguidance")
    value = {"type": "string", "pattern": r"^\d.$", "x-order": 1}
    schema = {"type": "object", "patternProperties": {f"^{name}\\d+$": value for name in "abcdef"},
              "additionalProperties": False}  # fmt: skip
    bytes_alone = [b"", *(bytes([byte]) for byte in range(256))]
    grammars = GrammarCompiler(bytes_alone, drops_leading_space=False, eos_token_ids=[0])
    grammar = grammars.get(SamplingConfig(structured_outputs=StructuredOutputs(json=schema)))
    assert isinstance(grammar, HostGrammar)
    assert grammar.of_schema
    assert accepts_on_host(schema, '{"a1": "1x", "f22": "9é"}')
    for text in ['{"a1": "٣x"}', '{"a1": "1\\r"}', '{"a٣": "1x"}', '{"a1":"1x"}', '{"g1": "1x"}']:
        assert not accepts_on_host(schema, text), text


def test_a_set_with_all_control_characters_has_no_quotes_and_backslashes_that_it_leaves_out():
    """llguidance lets a string have them, if such a set is in its pattern."""
    pytest.importorskip("llguidance")
    value = {"type": "string", "pattern": r'^[^"\\#]*$'}
    schema = {"patternProperties": {f"^{name}\\d+$": value for name in "abcdef"}, "additionalProperties": False}
    assert accepts_on_host(schema, r'{"a1": "x\n\té"}')
    for text in [r'{"a1": "x\"y"}', r'{"a1": "x\\y"}', '{"a1": "#"}']:
        assert not accepts_on_host(schema, text), text


def test_open_names_besides_many_that_are_declared():
    names = [f"{first}{second}name" for first in "abcdefgh" for second in "pqrstuvw"]
    schema = {"properties": {name: {"const": 1} for name in names}, "additionalProperties": {"const": 2}}
    automaton = build_automaton(json_schema_grammar(schema).pattern)
    assert automaton.has('{"apname": 1, "hwname": 1, "apnam": 2, "other": 2}')
    assert not automaton.has('{"other": 2, "cpname": 2}')


def test_keywords_that_are_read_past_are_named_once(caplog):
    grammars = GrammarCompiler([b"", b"1", b'"'], drops_leading_space=False, eos_token_ids=[0])
    with caplog.at_level(logging.WARNING):
        for keyword in ("minimun", "nullable"):
            schema = {"type": "integer", "maximum": 1, "minimum": 1, keyword: 3, "x-internal": 1}
            grammars.get(SamplingConfig(structured_outputs=StructuredOutputs(json=schema)))
    assert [record.getMessage() for record in caplog.records] == [
        "sampling.structured_outputs.json: keywords that JSON Schema does not have are read past, as validators do:"
        " 'minimun' (did you mean 'minimum'?)"
    ]
