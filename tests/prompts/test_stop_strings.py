import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.prompts.stop_strings import INSIDE, START, StopTable, build_stop_table, find_stop
from batchmix.prompts.vocabulary import join, strip_start

VOCABULARY = [
    b"",
    b" ",
    b"a",
    b"b",
    b"ab",
    b" a",
    b"  b",
    b"ba ab",
    b"\n\n",
    b"\xc3",
    b"\xa9",
    b"\xc3\xa9a",
    b"aab",
    b"",
]

letters = st.text("ab \né", min_size=1, max_size=5)
stops = st.lists(letters, min_size=1, max_size=4)
tokens = st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=12)


def run(table: StopTable, ids: list[int], state: int = START) -> tuple[int, int] | None:
    """(number of tokens read, index of the stop string) where the automaton first has a match."""
    for count, token in enumerate(ids, 1):
        state = int(table.next_state[state, token])
        if table.matched[state] >= 0:
            return count, int(table.matched[state])
    return None


@settings(max_examples=100, deadline=None)
@given(stops, tokens, st.booleans())
def test_stops_at_the_first_token_after_which_the_text_contains_a_stop_string(stop, ids, drops):
    table = build_stop_table(stop, VOCABULARY, drops_leading_space=drops)
    encoded = [text.encode() for text in stop]
    expected = None
    for count in range(1, len(ids) + 1):
        text = strip_start(join(ids[:count], VOCABULARY), drops)
        if any(one in text for one in encoded):
            found = find_stop(text, encoded)
            assert found is not None
            expected = count, found[2]
            break
    assert run(table, ids) == expected


@settings(max_examples=100, deadline=None)
@given(stops, st.binary(max_size=12).map(lambda data: data.translate(bytes(b"ab \n"[i % 4] for i in range(256)))))
def test_find_stop_is_what_reading_byte_by_byte_finds(stop, data):
    encoded = [text.encode() for text in stop]
    for end in range(len(data) + 1):
        endings = [(len(one), -index) for index, one in enumerate(encoded) if data[:end].endswith(one)]
        if endings:
            length, index = max(endings)
            assert find_stop(data, encoded) == (end - length, end, -index)
            return
    assert find_stop(data, encoded) is None


def test_table_is_absorbing_and_compact():
    table = build_stop_table(["ab", "\n\n"], VOCABULARY)
    assert table.next_state.dtype == np.int16
    assert table.matched.dtype == np.int32
    assert table.next_state.shape == (len(table.matched), len(VOCABULARY))
    for state in np.flatnonzero(table.matched >= 0):
        assert (table.next_state[state] == state).all()
    assert table.matched[START] == table.matched[INSIDE] == -1
    assert table.next_state[START, 0] == START  # a token without bytes changes nothing
    assert table.next_state[INSIDE, 0] == INSIDE


@pytest.mark.parametrize(
    ("stop", "ids", "expected"),
    [
        ([" a"], [5, 5], (2, 0)),  # the first token's space is not part of the text
        (["ab"], [2, 0, 3], (3, 0)),  # across an empty token
        (["aa"], [7], None),
        (["a"], [7, 2], (1, 0)),  # in the middle of a token
        (["b", "ab"], [4], (1, 1)),  # complete together: the longest
        (["bab", "a"], [3, 4], (2, 1)),  # complete first
        (["ab", "ab"], [4], (1, 0)),
        (["é"], [9, 10], (2, 0)),  # a character of two tokens
    ],
)
def test_which_stop_string_and_when(stop, ids, expected):
    assert run(build_stop_table(stop, VOCABULARY), ids) == expected


def test_many_states_take_a_wider_type():
    table = build_stop_table(["a" * 40_000], [b"a", b"b"])
    assert table.next_state.dtype == np.int32
    assert run(table, [0] * 40_000) == (40_000, 0)
