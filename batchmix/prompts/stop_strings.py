"""Stop strings as an automaton over tokens, so that the engine can check them on the device without any text.

A stop string counts where the bytes of the text first contain one. Which one: the one that is complete first; of
those that are complete at the same byte, the longest. `find_stop` says the same on the bytes of a whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

START = 0  # state of a text that has no bytes yet
INSIDE = 1  # state of a text in which no stop string has begun


@dataclass(frozen=True)
class StopTable:
    """`state = next_state[state, token]` from state START; `matched[state]` is the stop string that is complete.

    States with a match are absorbing: whatever follows, they keep it.
    """

    next_state: npt.NDArray[np.int16] | npt.NDArray[np.int32]  # [num_states, vocab]
    matched: npt.NDArray[np.int32]  # [num_states], index into `stop`, or -1


def find_stop(data: bytes, stop: Sequence[bytes]) -> tuple[int, int, int] | None:
    """(start, end, index) of the stop string that `data` contains first; None where it has none."""
    found = [(data.find(text), index) for index, text in enumerate(stop)]
    ends = [(start + len(stop[index]), start, index) for start, index in found if start >= 0]
    if not ends:
        return None
    end, start, index = min(ends)
    return start, end, index


def build_stop_table(
    stop: Sequence[str], token_bytes: Sequence[bytes], *, drops_leading_space: bool = True
) -> StopTable:
    """The automaton of `stop` (none empty) over a vocabulary; it takes a few milliseconds.

    `token_bytes` [vocab] and `drops_leading_space` are the tokenizer's, for the `skip_special_tokens` of the row.
    """
    goto, matched = _byte_automaton([text.encode() for text in stop])
    walk = _Walk(goto, token_bytes)
    next_state = np.empty((len(goto), len(token_bytes)), np.int16 if len(goto) < 2**15 else np.int32)
    next_state[INSIDE] = inside = walk.run(INSIDE)
    next_state[START] = walk.run_start(inside) if drops_leading_space else inside
    for state in range(INSIDE + 1, len(goto)):
        if matched[state] >= 0:
            next_state[state] = state
        else:
            next_state[state] = walk.run(state, inside)
    for state in range(len(goto)):
        next_state[state, walk.empty] = state
    return StopTable(next_state, matched)


def _byte_automaton(stop: Sequence[bytes]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Aho and Corasick's: goto [num_states, 256] and matched [num_states]. START behaves as INSIDE here."""
    children: list[dict[int, int]] = [{}, {}]
    own = [-1, -1]  # the stop string that ends in this state
    for index, text in enumerate(stop):
        state = INSIDE
        for byte in text:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                own.append(-1)
            state = children[state][byte]
        if own[state] < 0:
            own[state] = index
    goto = np.full((len(children), 256), INSIDE, np.int32)
    matched = np.array(own, np.int32)
    fallback = {INSIDE: INSIDE}
    queue = [INSIDE]
    for state in queue:
        back = fallback[state]
        if matched[state] < 0:
            matched[state] = matched[back]
        if matched[state] >= 0:
            goto[state] = state
            continue
        if state != INSIDE:
            goto[state] = goto[back]
        for byte, child in children[state].items():
            fallback[child] = goto[back, byte] if state != INSIDE else INSIDE
            goto[state, byte] = child
            queue.append(child)
    goto[START] = goto[INSIDE]
    return goto, matched


class _Walk:
    """Runs every token's bytes through the byte automaton, one byte position of all tokens at a time."""

    def __init__(self, goto: npt.NDArray[np.int32], token_bytes: Sequence[bytes]) -> None:
        lengths = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
        self._goto = goto
        self._bytes = np.frombuffer(b"".join(token_bytes), np.uint8)
        self._starts = np.cumsum(lengths) - lengths
        self._lengths = lengths
        self._longest_first = np.argsort(-lengths, kind="stable")
        self._longest_first = self._longest_first[: np.count_nonzero(lengths)]
        self._first = np.zeros(len(lengths), np.uint8)
        self._first[self._longest_first] = self._bytes[self._starts[self._longest_first]]
        self.empty = lengths == 0

    def run(self, state: int, inside: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.int32]:
        """The state after each token, from `state`, [vocab].

        Given those from INSIDE, only tokens whose first byte leads elsewhere are walked.
        """
        if inside is None:
            tokens, result = self._longest_first, np.full(len(self._lengths), state, np.int32)
        else:
            differs = self._goto[state] != self._goto[INSIDE]
            tokens, result = self._longest_first[differs[self._first[self._longest_first]]], inside.copy()
        result[tokens] = self._walk(state, tokens, 0)
        return result

    def run_start(self, inside: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The same at the start of the text, where one leading space is dropped."""
        tokens = self._longest_first[self._first[self._longest_first] == ord(" ")]
        result = inside.copy()
        result[tokens] = self._walk(INSIDE, tokens, 1)
        return result

    def _walk(self, state: int, tokens: npt.NDArray[np.int64], skip: int) -> npt.NDArray[np.int32]:
        states = np.full(len(tokens), state, np.int32)
        lengths, starts = self._lengths[tokens], self._starts[tokens]
        longest = int(lengths[0]) if len(tokens) else 0
        for position in range(skip, longest):
            active = len(tokens) - int(np.searchsorted(lengths[::-1], position, side="right"))
            states[:active] = self._goto[states[:active], self._bytes[starts[:active] + position]]
        return states
