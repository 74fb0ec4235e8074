"""What is kept of the automata of parts."""

from __future__ import annotations

import pytest

from batchmix.structured_output import dfa
from batchmix.structured_output.dfa import both, build_automaton
from batchmix.structured_output.pattern import NEVER, TooLarge, literal, repeat
from batchmix.structured_output.regex import regex_pattern


@pytest.fixture
def kept(monkeypatch):
    found = dfa._Kept(30)
    monkeypatch.setattr(dfa, "_KEPT", found)
    return found


def test_a_part_is_made_once_and_the_one_not_used_for_longest_goes_first(kept):
    words = [repeat(literal(char * 8), 0, None) for char in "abcd"]  # 8 states each
    first = build_automaton(words[0])
    build_automaton(words[1])
    assert build_automaton(words[0]) is first
    for word in words[2:]:
        build_automaton(word)
    assert kept.get(words[0]) is first
    assert kept.get(words[1]) is None, "three are 27 states"


def test_why_a_part_is_too_large_is_kept(kept, monkeypatch):
    part = regex_pattern("(a|b)*a(a|b){24}")
    with pytest.raises(TooLarge, match="the automaton is too large"):
        build_automaton(part)
    monkeypatch.setattr(dfa, "_built", None)
    with pytest.raises(TooLarge, match="the automaton is too large"):
        build_automaton(part)


def test_limits_that_leave_no_text_are_seen_and_those_too_large_to_tell_are_not():
    assert both([regex_pattern("a+"), regex_pattern("b+")]) == NEVER
    large = [regex_pattern("(?:[ab]{40}c?)*"), regex_pattern("(?:[ab]{41}c?)*"), regex_pattern("(?:[ab]{43}c?)*")]
    assert both(large) != NEVER
    with pytest.raises(TooLarge, match="limits that hold at once"):
        build_automaton(both(large))
