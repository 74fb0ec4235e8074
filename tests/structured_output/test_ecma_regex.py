"""ECMA-262's regexes as patterns, against V8."""

from __future__ import annotations

import importlib

import pytest
from guided_strategies import combined
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from batchmix.structured_output.ecma_regex import found_automaton, found_pattern
from batchmix.structured_output.pattern import TooLarge, Unsupported

pytest.importorskip("py_mini_racer")  # of the `dev` extra
JUDGE = importlib.import_module("schema_judge").Judge()

_ATOMS = ["a", "b", "é", ".", "[a-c]", "[^ab]", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"\p{L}", r"\P{Lu}", r"[\w-]",
          r"[^\s\d]", r"\u00e9", r"\u{1F600}", r"\x61", r"\n", r"\/", "[]", "[^]", r"[\b]", r"[^\p{L}]", r"\cJ"]  # fmt: skip


def _combined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return combined(
        inner,
        inner.map(lambda text: f"(?={text})"),
        inner.map(lambda text: f"(?!{text})"),
        inner.map(lambda text: f"^{text}"),
        inner.map(lambda text: f"{text}$"),
        inner.map(lambda text: f"(?<name>{text})"),
    )


REGEXES = st.recursive(st.sampled_from(_ATOMS), _combined, max_leaves=6)
TEXTS = st.text(st.sampled_from(list("abcABC1é日٣_-/ \n\r\t\b\u2028\ufeff\x1c😀😁")), max_size=5)


def check(regex: str, texts: list[str]) -> None:
    try:
        automaton = found_automaton(regex)
    except (Unsupported, TooLarge):
        assume(False)
        return
    for text in texts:
        assert (automaton is not None and automaton.has(text)) == JUDGE.found(regex, text), (regex, text)


@settings(max_examples=60, deadline=None)
@given(REGEXES, st.lists(TEXTS, min_size=1, max_size=12))
@example("a{2,5}(?:b{0,3}|ab+)c*", ["a", "xaay", "baaab", "caac", "abab"])  # counts before and behind any text
@example("(?:a{0,2}|b)+(?=c)[cd]{1,9}", ["c", "acd", "xbc", "d", "ab"])
@example("(?!(?:.)*$)", ["😀"])  # which V8 finds between the halves of the character
def test_a_text_fits_where_javascript_finds_the_regex(regex, texts):
    check(regex, texts)


@pytest.mark.slow  # 60 s
@settings(max_examples=2000, deadline=None)
@given(REGEXES, st.lists(TEXTS, min_size=1, max_size=12))
def test_many_regexes(regex, texts):
    check(regex, texts)


@pytest.mark.parametrize(
    "char", [*map(chr, range(0x250)), "\u1680", "\u180e", "\u2003", "\u2028", "\u202f", "\u3000", "\ufeff", "٣", "日"]
)
def test_classes_have_the_characters_of_javascript(char):
    for regex in (r"^\d$", r"^\w$", r"^\s$", "^.$", r"^[^\d\s]$", r"^\p{L}$", r"^\p{Nd}$", r"^\p{P}$"):
        automaton = found_automaton(regex)
        assert automaton is not None
        assert automaton.has(char) == JUDGE.found(regex, char), (regex, char)


@pytest.mark.parametrize("regex", [r"^\_a$", r"a\-b", "[\\w-.]x", "{a", "a}", r"^x{,3}$", r"\@"])
def test_what_is_wrong_in_unicode_mode_is_read_without_it(regex):
    automaton = found_automaton(regex)
    assert automaton is not None
    for text in ["_a", "a-b", "wx", ".x", "{a", "a}", "x{,3}", "@", "", "é", "b"]:
        assert automaton.has(text) == JUDGE.found(regex, text), text


@pytest.mark.parametrize(
    ("regex", "reason"),
    [
        ("(", "has a ( without )"), (")", "has a ) without ("), ("[", "ends too early"), ("*a", "repeats nothing"),
        ("a{3,2}", "out of order"), ("[b-a]", "out of order"), (r"\q", r"the escape \q, which"), (r"(a)\1", "a back-reference"),
        (r"\bx", r"\b is not supported"), ("(?<=a)b", "look-behind"), ("(?i)a", "a group (?...)"), ("(?P<n>a)", "a group (?...)"), ("(?<n>a)(?<n>b)", "whose name is none"),
        (r"\p{Greek}", "the property 'Greek'"), ("(?:^a)*", "within a repeat"), (r"\u12", "needs 4 hexadecimal"), ("a" * 9 + r"\x1", "needs 2"),
        ("(" * 300 + ")" * 300, "nested too deeply"), (r"\Z", r"the escape \Z"), ("(?=a)*", "repeats an assertion"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(regex, reason):
    with pytest.raises(Unsupported) as caught:
        found_pattern(regex)
    assert reason in str(caught.value)
