"""Tables over tokens and products of automata, against walks byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
from guided_strategies import REGEXES, SCHEMAS, TEXTS
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from batchmix.structured_output import string_states
from batchmix.structured_output.automata import ByteAutomaton, finite_texts, minimised, product
from batchmix.structured_output.dfa import build_automaton
from batchmix.structured_output.json_schema import json_schema_grammar
from batchmix.structured_output.pattern import Unsupported, repeat
from batchmix.structured_output.regex import regex_pattern
from batchmix.structured_output.string_states import StringStates
from batchmix.structured_output.token_classes import token_classes
from batchmix.structured_output.trie import TokenTrie

WORDS = [
    "a",
    "b",
    "ab",
    " a",
    " ",
    "é",
    "a b",
    "1",
    "日本",
    '"',
    '{"',
    '": ',
    '", "',
    '"}',
    "\\n",
    "a\\",
    '\\"b',
    "abcabc",
    "é日",
]
PIECES = [b"", *(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS)]
TRIE = TokenTrie(PIECES)


def check(automaton: ByteAutomaton) -> None:
    table, token_class = token_classes(automaton.goto, TRIE, False, {}, None)
    for state in range(len(automaton.goto)):
        expected = np.full(len(PIECES), -1)
        _, token, after = TRIE.tree.walk(automaton.goto, np.array([state]))
        expected[token] = after
        assert (table[state][token_class] == expected).all()
    assert len(np.unique(table, axis=1).T) == table.shape[1], "no two classes are alike"


@pytest.fixture(autouse=True)
def string_states_of_few_tokens(monkeypatch):
    """The vocabulary is small."""
    monkeypatch.setattr(string_states, "_MANY_TOKENS", 20)


def automaton_of(schema: object) -> ByteAutomaton:
    try:
        grammar = json_schema_grammar(schema)
        assume(not grammar.rules)
        found = build_automaton(grammar.pattern)
    except Unsupported:
        assume(False)
        raise
    assume(len(found.accepts) < 1500)
    return found


@settings(max_examples=25, deadline=None)
@given(SCHEMAS)
def test_each_state_leads_where_the_bytes_of_a_token_lead(schema):
    check(automaton_of(schema))


@pytest.mark.parametrize(
    "schema",
    [{"type": "string"}, {"type": "string", "maxLength": 7}, {"type": "array", "items": {"type": "string"}},
     {"type": "string", "pattern": "^.{2,5}$"}, {"pattern": "^[A-Za-z0-9]{2,9}$"}, {"pattern": "ab+.*(é|日)"},
     {"pattern": "^[a-z][A-Z0-9é_-]*b?$", "maxLength": 9}, {"properties": {"a": {"pattern": "a.b"}, "b": {"pattern": "^[^a]+$"}}},
     {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "number"}, {"pattern": "^[0-9a-zA-Z ]*$"}]}, {"properties": {"a": {"type": "string"}, "b": {"maxLength": 3}}}],
)  # fmt: skip
def test_strings_of_any_and_of_few_characters(schema):
    automaton = build_automaton(json_schema_grammar(schema).pattern)
    assert len(StringStates(automaton.goto, TRIE, ()).states), "there is an inside of a string"
    check(automaton)


@pytest.mark.parametrize(
    ("regexes", "without", "size"),
    [
        (["a{0,40}b", "(?:aa)*b"], [], 42),
        (["[ab]*", ".{0,9}"], ["a*"], 20),
        (["(?:a|bc){3,8}", "[^d]{5,9}"], ["b.*"], 40),
    ],
)
def test_products_and_counted_automata_are_smallest(regexes, without, size):
    parts = [build_automaton(regex_pattern(regex)) for regex in regexes]
    found = product(parts, [build_automaton(regex_pattern(regex)) for regex in without])
    assert len(found.accepts) == len(minimised(found).accepts) <= size


@settings(max_examples=30, deadline=None)
@given(REGEXES, REGEXES, REGEXES, st.lists(TEXTS, min_size=1, max_size=20))
def test_a_product_has_the_texts_of_all_and_not_of_the_others(first, second, third, texts):
    parts = [build_automaton(regex_pattern(regex)) for regex in (first, second, third)]
    found = product(parts[:2], parts[2:])
    for text in texts:
        assert found.has(text) == (parts[0].has(text) and parts[1].has(text) and not parts[2].has(text))


@settings(max_examples=30, deadline=None)
@given(REGEXES, st.lists(TEXTS, min_size=1, max_size=20))
def test_the_minimised_automaton_has_the_same_texts_and_no_more_states(regex, texts):
    automaton = build_automaton(regex_pattern(regex))
    small = minimised(automaton)
    assert len(small.accepts) <= len(automaton.accepts)
    assert len(minimised(small).accepts) == len(small.accepts)
    for text in texts:
        assert small.has(text) == automaton.has(text)


def test_texts_of_a_finite_automaton():
    assert finite_texts(build_automaton(regex_pattern("(a|b)c?")), 4) == ["a", "ac", "b", "bc"]
    assert finite_texts(build_automaton(regex_pattern("(a|b)c?")), 3) is None
    assert finite_texts(build_automaton(repeat(regex_pattern("a"), 0, None)), 9) is None
