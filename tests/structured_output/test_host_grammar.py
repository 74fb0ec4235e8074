"""Grammars that llguidance follows, against tables and against the jsonschema library."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
from guided_strategies import REGEXES, SCHEMAS
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from batchmix.prompts.vocabulary import strip_start
from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.structured_output.compile import GrammarCompiler
from batchmix.structured_output.dfa import build_automaton
from batchmix.structured_output.grammar import compile_grammar
from batchmix.structured_output.host_grammar import GrammarMatcher, HostGrammar, HostVocabulary, follow, host_grammar
from batchmix.structured_output.json_schema import json_schema_grammar
from batchmix.structured_output.pattern import Grammar, Unsupported
from batchmix.structured_output.regex import regex_pattern
from batchmix.structured_output.trie import TokenTrie

jsonschema = pytest.importorskip("jsonschema")  # of the `annotate` extra
pytest.importorskip("llguidance")

# Control tokens, single bytes as SentencePiece has them, then pieces that overlap.
WORDS = ["a", "b", "ab", "aa", " a", " ", "  ", "é", "a b", "x1", "1", "日本", '"', '{"', '": ', '", "', '"}', "]]"]
PIECES = [b"", b"", b"", *(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS)]
EOS = 2
TREE: dict[str, Any] = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"n": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["n"],
        }
    },
    "$ref": "#/$defs/node",
}


@cache
def vocabulary(drops_leading_space: bool) -> HostVocabulary:
    tokens = np.zeros(len(PIECES), np.bool_)
    tokens[TRIE.tree.token[TRIE.tree.token >= 0]] = True
    return HostVocabulary(PIECES, tokens, None, drops_leading_space)


TRIE = TokenTrie(PIECES)


@cache
def grammars() -> GrammarCompiler:
    return GrammarCompiler(PIECES, drops_leading_space=True, eos_token_ids=[EOS])


def get(**asked: Any) -> HostGrammar:
    grammar = grammars().get(SamplingConfig(structured_outputs=StructuredOutputs(**asked)))
    assert isinstance(grammar, HostGrammar)
    return grammar


def names(tokens: np.ndarray) -> list[bytes]:
    return [PIECES[token] for token in np.flatnonzero(tokens)[:9]]


def check_like_the_table(grammar: Grammar, drops: bool, source: random.Random) -> None:
    """Along a random walk both allow the same tokens, but for stretches that the library knows to be forced."""
    try:
        automaton = build_automaton(grammar.pattern)
        table = compile_grammar(automaton, TRIE, end_tokens=[EOS], drops_leading_space=drops)
    except Unsupported as error:
        assume("no text fits" not in str(error))
        assume("too large" not in str(error))
        raise
    text, state = GrammarMatcher(host_grammar(grammar, vocabulary(drops), [EOS])), table.start
    said: list[bytes] = []
    for _ in range(12):
        expected, found = table.allowed_tokens(state, 2**20).allowed, text.following.tokens.allowed
        assert text.may_end == table.may_end(state)
        forced = text.following.goes_on and found.sum() - found[EOS] == 1
        alike = expected[found].all() if forced else (found == expected).all()
        assert alike, (said, names(found), names(expected))
        assert text.following.goes_on or table.is_over(state)
        options = [token for token in np.flatnonzero(found).tolist() if token != EOS]
        if not options:
            return
        token = source.choice(options)
        said.append(PIECES[token])
        text.take([token])
        follow([text])
        state = table.next_state(state, token)


@settings(max_examples=20, deadline=None)
@given(REGEXES, st.booleans(), st.randoms(use_true_random=False))
def test_a_regex_allows_what_its_table_allows(regex, drops, source):
    check_like_the_table(Grammar(regex_pattern(regex)), drops, source)


@settings(max_examples=20, deadline=None)
@given(SCHEMAS, st.booleans(), st.randoms(use_true_random=False))
def test_a_schema_allows_what_its_table_allows(schema, drops, source):
    check_like_the_table(json_schema_grammar(schema), drops, source)


@pytest.mark.slow  # 20 s
@settings(max_examples=600, deadline=None)
@given(REGEXES, SCHEMAS, st.booleans(), st.randoms(use_true_random=False))
def test_many_regexes_and_schemas_allow_what_their_tables_allow(regex, schema, drops, source):
    check_like_the_table(Grammar(regex_pattern(regex)), drops, source)
    check_like_the_table(json_schema_grammar(schema), drops, source)


def unrolled(depth: int) -> dict[str, Any]:
    """TREE without recursion, `depth` nodes deep."""
    node: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    if depth > 1:
        node["properties"]["children"] = {"type": "array", "items": unrolled(depth - 1)}
    return node


@pytest.mark.parametrize("drops", [False, True])
def test_a_recursive_schema_allows_what_it_does_when_it_is_written_out(drops):
    """The walk stays above the depth to which it is: a bracket is one byte, and each node takes more than eight."""
    table_of = compile_grammar(
        build_automaton(json_schema_grammar(unrolled(4)).pattern), TRIE, end_tokens=[EOS], drops_leading_space=drops
    )
    source, depths = random.Random(0), set()
    for _ in range(20):
        text = GrammarMatcher(host_grammar(json_schema_grammar(TREE), vocabulary(drops), [EOS]))
        state, said = table_of.start, b""
        while said.count(b"{") < 4:
            found, expected = text.following.tokens.allowed, table_of.allowed_tokens(state, 2**20).allowed
            assert text.may_end == table_of.may_end(state)
            assert (found == expected).all() or (found.sum() == 1 and expected[found].all())
            options = [token for token in np.flatnonzero(found).tolist() if token != EOS]
            if not options:
                break
            likely = [token for token in options if not PIECES[token].isdigit()] or options
            token = source.choice(likely if source.random() < 0.9 else options)
            said += PIECES[token]
            text.take([token])
            follow([text])
            state = table_of.next_state(state, token)
        depths.add(said.count(b"{"))
    assert depths >= {1, 2, 4}


ANY_TEXT: list[Any] = [
    TREE,
    {},
    {"title": "Payload", "description": "as pydantic writes Any"},
    {"type": "object"},
    {"type": "array"},
    {"type": "array", "items": {"$ref": "#"}, "maxItems": 3},
    {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
    {"type": "string", "maxLength": 100_000},
    {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}},
               "b": {"type": "object", "additionalProperties": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
]  # fmt: skip


@pytest.mark.parametrize("schema", ANY_TEXT, ids=json.dumps)
def test_what_has_no_table_is_valid_too(schema):
    check, source, found = jsonschema.Draft202012Validator(schema), random.Random(1), 0
    for _ in range(12):
        text, tokens = GrammarMatcher(get(json=schema)), []
        while len(tokens) < 200:
            options = [token for token in np.flatnonzero(text.following.tokens.allowed).tolist() if token != EOS]
            if not options or (text.may_end and source.random() < 0.3):
                break
            closing = [token for token in options if PIECES[token][:1] in b']}"']
            tokens.append(source.choice(closing if closing and source.random() < 0.5 else options))
            text.take(tokens[-1:])
            follow([text])
        if text.may_end:
            found += 1
            said = strip_start(b"".join(PIECES[token] for token in tokens), True).decode()
            assert check.is_valid(json.loads(said)), said
    assert found > 3


@pytest.mark.slow  # 5 s and more
def test_many_choices():
    source = random.Random(2)
    choices = sorted({"".join(source.choices("ab 1é", k=source.randint(6, 12))) for _ in range(9000)})
    grammar = get(choice=choices)
    for said in source.sample(choices, 5):
        text = GrammarMatcher(grammar)
        rest = f" {said}".encode()  # as SentencePiece begins
        while rest:
            options = np.flatnonzero(text.following.tokens.allowed).tolist()
            token = source.choice([token for token in options if rest.startswith(PIECES[token] or b"?")])
            rest = rest[len(PIECES[token]) :]
            text.take([token])
            follow([text])
        assert text.may_end
        assert text.following.tokens.allowed[EOS]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"json": {"$ref": "#"}}, "json: no text fits"),
        ({"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}}, "json: no text fits"),
        (
            {"json": {"$defs": {"t": {"type": "array", "items": {"contains": {}}}}, "$ref": "#/$defs/t"}},
            "the keyword 'contains'",
        ),
    ],
)
def test_what_has_no_text_is_refused(asked, reason):
    with pytest.raises(Unsupported, match=reason):
        get(**asked)


def test_a_vocabulary_that_cannot_say_every_text_is_refused():
    few = GrammarCompiler([b"", b"", b"", b"1", b"{", b'"'], drops_leading_space=False, eos_token_ids=[EOS])
    with pytest.raises(Unsupported, match=r"json: recursive \(.*\); without tables it needs .* a token for each byte"):
        few.get(SamplingConfig(structured_outputs=StructuredOutputs(json=TREE)))


def test_a_way_that_never_ends_is_not_begun():
    endless = {"type": "object", "properties": {"a": {"$ref": "#/$defs/endless"}}, "required": ["a"]}
    definitions = {"endless": endless, **TREE["$defs"]}
    grammar = get(json={"$defs": definitions, "anyOf": [{"$ref": "#/$defs/endless"}, {"$ref": "#/$defs/node"}]})
    text, said = GrammarMatcher(grammar), b""
    while text.following.tokens.allowed.sum() == 1:
        token = int(text.following.tokens.allowed.argmax())
        said += PIECES[token]
        text.take([token])
        follow([text])
    assert said.strip().startswith(b'{"n')


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({"allowed_token_ids": list(range(3, 259))}, r"recursive \(.*\); allowed_token_ids"),
        ({"stop_token_ids": [100]}, r"recursive \(.*\); allowed_token_ids, and stop_token_ids with a text"),
    ],
)
def test_keys_that_need_a_table(wish, reason):
    with pytest.raises(Unsupported, match=reason):
        grammars().get(SamplingConfig(structured_outputs=StructuredOutputs(json=TREE), **wish))


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    fresh = GrammarCompiler(PIECES, drops_leading_space=True, eos_token_ids=[EOS])
    with pytest.raises(Unsupported, match=r"json: recursive \(.*\); .*pip install llguidance"):
        fresh.get(SamplingConfig(structured_outputs=StructuredOutputs(json=TREE)))
