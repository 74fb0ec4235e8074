"""Grammars over tokens, against the definition: which tokens lead to a text in time."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path

import pytest
from guided_strategies import REGEXES
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import batchmix
from batchmix.prompts.tokenizer import load_tokenizer
from batchmix.prompts.vocabulary import strip_start
from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.structured_output.compile import GrammarCompiler
from batchmix.structured_output.grammar import CompiledGrammar
from batchmix.structured_output.pattern import Unsupported

# 0 to 2 are control tokens, 3 to 258 single bytes as SentencePiece has them, then pieces that overlap.
WORDS = ["a", "b", "ab", "aa", " a", " ", "  ", "é", "a b", "x1", "1", "bc", "日本", '"']
PIECES = [b"", b"", b"", *(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS)]
EOS = 2


def guided(**asked: object) -> SamplingConfig:
    return SamplingConfig(structured_outputs=StructuredOutputs(**asked))  # type: ignore[arg-type]


@cache
def grammars(drops_leading_space: bool) -> GrammarCompiler:
    return GrammarCompiler(PIECES, drops_leading_space=drops_leading_space, eos_token_ids=[EOS])


def allowed(grammar: CompiledGrammar, state: int, left: int) -> list[int]:
    found = [token for token in range(len(PIECES)) if grammar.is_allowed(state, token, left)]
    tokens = grammar.allowed_tokens(state, left)
    assert tokens.allowed.nonzero()[0].tolist() == found
    return found


@settings(max_examples=12, deadline=None)
@given(REGEXES, st.integers(1, 6), st.booleans(), st.randoms(use_true_random=False))
def test_any_way_through_a_guide_is_a_text_in_time(regex, most, drops, source):
    """At each step one of the tokens allowed, as a model would: the text matches after at most max_tokens tokens."""
    try:
        grammar = grammars(drops).get(guided(regex=regex))
    except Unsupported as error:
        assume("too large" not in str(error) and "no text" not in str(error))
        raise
    most = max(most, grammar.tokens_needed(0), 1)
    state, tokens = grammar.start, []
    while len(tokens) < most and not grammar.is_over(state):
        options = allowed(grammar, state, most - len(tokens) - 1)
        assert options, "a dead end"
        token = source.choice(options)
        if token == EOS:
            assert grammar.may_end(state)
            break
        tokens.append(token)
        state = grammar.next_state(state, token)
    text = strip_start(b"".join(PIECES[token] for token in tokens), drops).decode()
    assert re.fullmatch(regex, text), text


@settings(max_examples=12, deadline=None)
@given(REGEXES, st.booleans())
def test_a_guide_needs_no_more_tokens_than_it_must(regex, drops):
    """The distances, against a search over sequences of tokens."""
    try:
        grammar = grammars(drops).get(guided(regex=regex))
    except Unsupported as error:
        assume("too large" not in str(error) and "no text" not in str(error))
        raise
    frontier, steps = {grammar.start}, 0
    while not any(grammar.may_end(state) for state in frontier):
        assert steps <= grammar.shortest
        frontier = {
            grammar.next_state(state, token)
            for state in frontier
            for token in allowed(grammar, state, 10**6)
            if token != EOS
        }
        steps += 1
    assert steps == grammar.shortest


def test_the_leading_space_of_sentencepiece():
    grammar = grammars(True).get(guided(choice=["a", " a"]))
    first = {PIECES[token] for token in allowed(grammar, grammar.start, 10)}
    assert first == {b"a", b" a", b" ", b"  "}
    after_space = grammar.next_state(grammar.start, PIECES.index(b" ", 259))
    assert {PIECES[token] for token in allowed(grammar, after_space, 10)} == {b"a", b" a", b" "}
    inside = grammars(True).get(guided(choice=["b a"]))
    after = inside.next_state(inside.start, PIECES.index(b"b", 259))
    assert PIECES.index(b" a", 259) in allowed(inside, after, 10)


def test_control_tokens_and_second_tokens_of_one_text_are_never_allowed():
    grammar = grammars(False).get(guided(regex="(?s).*"))
    found = allowed(grammar, grammar.start, 10**6)
    assert 0 not in found
    assert 1 not in found
    assert EOS in found
    assert PIECES.index(b"a") not in found, "the byte token of a character that has a piece"
    assert PIECES.index(b"a", 259) in found
    assert PIECES.index(b"Z") in found, "the byte token of one that has none"


def test_end_tokens():
    base = guided(regex="a+")
    state = grammars(False).get(base).next_state(grammars(False).get(base).start, PIECES.index(b"a", 259))
    assert EOS in allowed(grammars(False).get(base), state, 5)
    base.ignore_eos = True
    silent = grammars(False).get(base)
    assert EOS not in allowed(silent, silent.next_state(silent.start, PIECES.index(b"a", 259)), 5)
    base.stop_token_ids = [1, PIECES.index(b"aa", 259)]
    stopped = grammars(False).get(base)
    start, after = allowed(stopped, stopped.start, 5), stopped.next_state(stopped.start, PIECES.index(b"a", 259))
    assert PIECES.index(b"aa", 259) not in start, "what stops the row is no part of its text"
    assert {1, PIECES.index(b"aa", 259)} < set(allowed(stopped, after, 5))
    base.allowed_token_ids = [PIECES.index(b"ab", 259)]
    with pytest.raises(Unsupported, match="no tokens for any text that fits"):
        grammars(False).get(base)


def test_max_tokens_that_are_too_few_are_known():
    grammar = grammars(False).get(guided(choice=["aaab", "bcab"]))
    assert (grammar.tokens_needed(0), grammar.shortest_longer) == (2, 2)
    empty = grammars(False).get(guided(regex="(aaa)?"))
    assert (empty.tokens_needed(0), empty.tokens_needed(1)) == (0, 2)


def test_counted_texts_and_choices_without_tokens():
    only_words = GrammarCompiler([b"", b"", b"", b"ab", b"c"], drops_leading_space=False, eos_token_ids=[2])
    assert only_words.get(guided(choice=["abc", "a"])).shortest == 2
    with pytest.raises(Unsupported, match=r"sampling\.structured_outputs\.regex: the model's vocabulary has no tokens"):
        only_words.get(guided(regex="ba+"))


@lru_cache
def mixtral() -> GrammarCompiler:
    tokenizer = load_tokenizer(Path(batchmix.__file__).parent / "models" / "tiny")
    assert tokenizer is not None
    return GrammarCompiler.of(tokenizer, 32000, [2])


def test_forced_stretches_in_the_tokenizers_own_tokens():
    tokenizer = load_tokenizer(Path(batchmix.__file__).parent / "models" / "tiny")
    assert tokenizer is not None
    schema = {"type": "object", "properties": {"topic": {"type": "boolean"}, "urgent": {"enum": [1, 2]}},
              "required": ["topic", "urgent"]}  # fmt: skip
    grammar = mixtral().get(guided(json=schema))
    text = '{"topic": true, "urgent": 2}'
    ids = list(tokenizer.encode_texts([text])[0])[1:]
    state, forced = grammar.start, 0
    for token in ids:
        assert grammar.is_allowed(state, token, 100), "the tokenizer's own tokens are always a way"
        assert grammar.forced.get(state, token) == token
        forced += state in grammar.forced
        state = grammar.next_state(state, token)
    assert grammar.is_over(state)
    assert forced >= len(ids) - 5, "all but true, 2 and what may begin with the quote or the space before"


def test_a_schema_compiles_in_no_time_over_the_whole_vocabulary():
    grammar = mixtral().get(guided(json={"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}))
    assert len(grammar.token_class) == 32000
    assert grammar.table.nbytes < 2**17, "classes of tokens keep it small"


def test_choices_that_do_not_come_back_are_refused():
    assert mixtral().choice_tokens(guided(choice=["positive", "negative"])) != []
    with pytest.raises(Unsupported, match=r"choice: the tokenizer cannot encode"):
        GrammarCompiler(
            PIECES, drops_leading_space=False, eos_token_ids=[2], encode=lambda texts: [[259]] * len(texts)
        ).choice_tokens(guided(choice=["a", "b"]))
