"""Regexes as automata, against `re` itself."""

from __future__ import annotations

import re

import pytest
from guided_strategies import REGEXES, TEXTS
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from batchmix.structured_output.dfa import build_automaton
from batchmix.structured_output.pattern import Unsupported
from batchmix.structured_output.regex import regex_pattern


@settings(max_examples=15, deadline=None)
@given(REGEXES, st.lists(TEXTS, min_size=20, max_size=20))
@example("a|ab", ["a", "ab", "aa"])  # the first alternative that fits is not all of them
@example("a*?", ["", "a", "aa"])
@example(r"(?a)\w(?u:\w)", ["aé", "éa", "é٣", "a٣"])
@example(r"(?i)\w[\u0345]", ["a\u0345", "\u0345\u0399", "\u0399\u03b9"])  # a set's case partners, not a class's
@example("(?:a*b){0,3}", ["ab", "abab", "aab", "aaa", "abababab"])  # a way back to an item's start
@example("(?:ab){2,4}(?:[b-d]é|x){0,3}a?", ["abab", "ababcéa", "abababababxbé", "ababxxxx"])
@example("(?:a|ab)(?:bc|c)*a|ab?c+", ["abca", "abcc", "abcca", "accc"])
@example("(?i)[k-s]ß", ["Kß", "ſß", "Kẞ", "kß", "aß"])
def test_an_automaton_accepts_what_re_does(regex, texts):
    try:
        whole = build_automaton(regex_pattern(regex))
    except Unsupported as error:
        assume("too large" not in str(error))
        raise
    for text in texts:
        assert whole.has(text) == (re.fullmatch(regex, text) is not None), (regex, text)


@pytest.mark.parametrize("regex", ["^a$|^bc", "^(b|c$)", "a(b|c)$", "^", r"\Aab\Z"])
def test_anchors_at_the_ends(regex):
    whole = build_automaton(regex_pattern(regex))
    for text in ("", "a", "b", "bc", "ab", "abc", "xa", "ax", "bcx", "xbc", "ac", "xac", "xb", "ab\nb"):
        assert whole.has(text) == (re.fullmatch(regex, text) is not None), text


def test_every_character_is_of_the_class_that_re_says():
    characters = [chr(code) for code in range(0, 0x11000, 31) if not 0xD800 <= code <= 0xDFFF]
    for regex in (r"\w", r"\W", r"\d", r"\s", r"\S", r"(?i)[^a-zµ]", r"(?i)\W", r"(?a)\w"):
        automaton = build_automaton(regex_pattern(regex))
        for char in characters:
            assert automaton.has(char) == (re.fullmatch(regex, char) is not None), (regex, char)


@pytest.mark.parametrize(
    ("regex", "feature"),
    [
        ("(?=a)b", r"look-around"),
        (r"a\b", r"\\b is not supported"),
        (r"(a)\1", "a back-reference"),
        ("(a)?(?(1)b|c)", "a conditional group"),
        ("(?>a)b", "an atomic group"),
        ("a++b", "a possessive repeat"),
        ("a^b", r"\^ or \$ inside"),
        ("(?m)^a", "the flags L, and m"),
        ("(", "unterminated subpattern"),
        ("a{200000}", "a repeat of more than 100,000"),
        ("[^\\x00-\\U0010ffff]", "no text fits"),
    ],
)
def test_what_cannot_be_done_is_named(regex, feature):
    with pytest.raises(Unsupported, match=feature):
        build_automaton(regex_pattern(regex))


@pytest.mark.parametrize("regex", ["(a|b)*a(a|b){24}", pytest.param("(a{1000}){1000}", marks=pytest.mark.slow)])
def test_a_regex_that_would_fill_the_memory_is_refused(regex):
    with pytest.raises(Unsupported, match="the automaton is too large"):
        build_automaton(regex_pattern(regex))
