"""States that allow many tokens, the inside of strings, and the tokens that lead them to the same states.

Many bytes are alike there, as all letters are in a string without a pattern, so tokens of like bytes form a group. Which bytes
are alike is found for each string apart. Tokens with a quotation mark or a backslash, which lead out of strings, are in no group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchmix.structured_output.pattern import TooLarge
from batchmix.structured_output.trie import Ints, TokenTrie

QUOTES = b'"\\'
_MANY_BYTES = 32  # of a state: hexadecimal digits are fewer, a character's last byte alone has 64
_MAX_ENTRIES = 3_000_000  # states by tokens, or by groups of tokens: half a second
_MANY_TOKENS = 300  # that may begin a way through several such states


@dataclass(frozen=True)
class Inside:
    """States, and where each group of tokens leads from them."""

    states: Ints
    after: npt.NDArray[np.int32]  # [states, groups + 1], -1: none; the last group is of tokens with one of QUOTES
    group: Ints  # of each token, [V]


def check_entries(count: int) -> None:
    """TooLarge where tables of so many entries take too long."""
    if count > _MAX_ENTRIES:
        raise TooLarge("the token tables take too long; shorten patterns, counted repetitions or choices")


class StringStates:
    """Of an automaton `goto` [S, 256]; `states` are those that allow many tokens, about, and are none of `but`."""

    def __init__(self, goto: npt.NDArray[np.int32], trie: TokenTrie, but: Iterable[int]) -> None:
        self._trie = trie
        # Runs of bytes that are neighbours and alike everywhere.
        begins = np.append(True, (goto[:, 1:] != goto[:, :-1]).any(0))
        begins[[*QUOTES, *(byte + 1 for byte in QUOTES)]] = True
        first = np.flatnonzero(begins)
        plain = ~np.isin(first, list(QUOTES))
        self._first = first[plain]  # byte of each run
        self._run = np.where(np.isin(np.arange(256), list(QUOTES)), -1, np.cumsum(plain)[np.cumsum(begins) - 1] - 1)
        self._rows = goto[:, self._first]  # [S, runs]
        wide = np.append(
            (self._rows >= 0) @ np.bincount(self._run + 1)[1:] >= _MANY_BYTES, False
        )  # the last is -1, for none
        tokens = np.bincount(self._run + 1, trie.tokens_from)[1:]
        many = wide[self._rows] @ tokens >= _MANY_TOKENS
        many[list(but)] = False
        self.states = np.flatnonzero(many)

    def insides(self) -> list[Inside]:
        """The tokens without QUOTES from the states, put together where the same bytes are alike."""
        size = len(self._rows)
        first, behind = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        first[self.states] = True
        frontier = self.states
        while len(frontier):
            after = np.zeros(size + 1, np.bool_)
            after[self._rows[frontier]] = True
            frontier = np.flatnonzero(after[:-1] & ~behind)
            behind[frontier] = True
        every = np.flatnonzero(first | behind)
        first, behind = first[every], behind[every]
        numbers = np.full(size + 1, -1, np.int64)
        numbers[every] = np.arange(len(every))
        rows = numbers[self._rows[every]]
        component = _components(rows)
        for salt in range(8):  # other random words if two runs that differ have one sum
            words = np.random.default_rng(salt).integers(1, 2**63, (len(every), 1), np.uint64) * rows.astype(np.uint64)
            alike = [
                _alike(words * which[:, None], component) for which in (first, behind)
            ]  # [components, runs], twice
            if all((np.take_along_axis(rows, one[component], 1) == rows)[which].all()
                   for one, which in zip(alike, (first, behind), strict=True)):  # fmt: skip
                break
        else:
            raise AssertionError("bytes that differ have one sum, eight times")
        members: dict[bytes, list[int]] = {}  # components, by what is alike
        both = np.concatenate(alike, 1)
        for number in np.unique(component[first]).tolist():
            members.setdefault(both[number].tobytes(), []).append(number)
        return [
            self._inside(every[first & np.isin(component, some)], [one[some[0]] for one in alike])
            for some in members.values()
        ]

    def _inside(self, states: Ints, alike: Sequence[Ints]) -> Inside:
        """`alike`: for each run the first one that is as it, as the first byte of a token and as another."""
        (firsts, first_class), (others, other_class) = (np.unique(one, return_inverse=True) for one in alike)
        first_class, other_class = (np.append(one, -1)[self._run] for one in (len(others) + first_class, other_class))
        tree, group = self._trie.grouped(first_class, other_class)
        groups = int(group.max(initial=-1)) + 1
        check_entries(len(states) * groups)
        origin, token, after = tree.walk(self._rows[:, np.append(others, firsts)], states)
        table = np.full((len(states), groups + 1), -1, np.int32)
        table[origin, token] = after
        return Inside(states, table, np.where(group < 0, groups, group))


def _alike(words: npt.NDArray[np.uint64], component: Ints) -> Ints:
    """For each run of bytes the first one that leads all states of a component to the same. [components, runs]."""
    sums = np.zeros((component.max() + 1, words.shape[1]), np.uint64)
    np.add.at(sums, component, words)
    return np.stack([(one[:, None] == one[None, :]).argmax(1) for one in sums])


def _components(rows: Ints) -> Ints:
    """Of each state a number that states which lead to one another share, from 0 on. `rows` [states, runs], -1: none."""
    new = np.append(np.ones((len(rows), 1), np.bool_), rows[:, 1:] != rows[:, :-1], 1) & (rows >= 0)
    source, column = np.nonzero(new)
    to = rows[source, column]
    label = np.arange(len(rows))
    while True:
        low = np.minimum(label[source], label[to])
        joined = label.copy()
        np.minimum.at(joined, label[source], low)
        np.minimum.at(joined, label[to], low)
        joined = joined[joined]
        if (joined == label).all():
            numbers: Ints = np.unique(label, return_inverse=True)[1]
            return numbers
        label = joined
