"""Patterns as deterministic automata over the bytes of UTF-8 text.

Thompson's construction, then subsets of its states, over classes of bytes that no pattern tells apart. Both are bounded:
a pattern whose automaton would be too large is refused instead of filling the memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from batchmix.structured_output.pattern import (
    NEVER,
    Alt,
    Chars,
    Named,
    NoText,
    Pattern,
    Range,
    Repeat,
    Seq,
    TooLarge,
    utf8,
)

MAX_STATES = 16_384  # of an automaton; a string of up to 1,000 characters takes 9,000
_MAX_NFA_STATES = 150_000
_MAX_WORK = 20_000_000  # edges looked at for each range of bytes: a few seconds; a string of up to 1,000 characters takes 2 % of it
_TOO_LARGE = "the automaton is too large; shorten counted repetitions (maxLength, maxItems, {low,high}) or the choices"


@dataclass(frozen=True)
class ByteAutomaton:
    """`state = goto[state, byte]` from state 0, -1 where no text goes on like that; `accepts[state]`: a whole text."""

    goto: npt.NDArray[np.int32]  # [num_states, 256]
    accepts: npt.NDArray[np.bool_]  # [num_states]


def build_automaton(pattern: Pattern) -> ByteAutomaton:
    """The automaton of the UTF-8 texts of a pattern. Unsupported where there is none or it would be too large."""
    if pattern == NEVER:
        raise NoText
    nfa = _Nfa()
    start, end = nfa.state(), nfa.state()
    nfa.add(pattern, start, end)
    return _determinise(nfa, start, end)


class _Nfa:
    def __init__(self) -> None:
        self.empty: list[list[int]] = []  # by state: where one may go on without a byte
        self.edges: list[list[tuple[int, int, int]]] = []  # by state: (first byte, last byte, next state)

    def state(self) -> int:
        if len(self.edges) >= _MAX_NFA_STATES:
            raise TooLarge(_TOO_LARGE)
        self.empty.append([])
        self.edges.append([])
        return len(self.edges) - 1

    def add(self, pattern: Pattern, start: int, end: int) -> None:
        """Paths from `start` to `end` for the texts of the pattern."""
        if isinstance(pattern, Chars):
            self._add_bytes(utf8(pattern.ranges), start, end)
        elif isinstance(pattern, Seq):
            for item in pattern.items[:-1]:
                following = self.state()
                self.add(item, start, following)
                start = following
            if pattern.items:
                self.add(pattern.items[-1], start, end)
            else:
                self.empty[start].append(end)
        elif isinstance(pattern, Alt):
            for item in pattern.items:
                # States of its own: a loop at the end of one alternative must not lead into another.
                first, last = self.state(), self.state()
                self.empty[start].append(first)
                self.add(item, first, last)
                self.empty[last].append(end)
        else:
            assert not isinstance(pattern, Named), "no finite automaton follows a rule"
            self._add_repeat(pattern, start, end)

    def _add_repeat(self, pattern: Repeat, start: int, end: int) -> None:
        for _ in range(pattern.low):
            following = self.state()
            self.add(pattern.item, start, following)
            start = following
        if pattern.high is None:
            loop = self.state()
            self.empty[start].append(loop)
            back = self.state()
            self.add(pattern.item, loop, back)
            self.empty[back].append(loop)
            self.empty[loop].append(end)
            return
        for _ in range(pattern.high - pattern.low):
            self.empty[start].append(end)
            following = self.state()
            self.add(pattern.item, start, following)
            start = following
        self.empty[start].append(end)

    def _add_bytes(self, sequences: Iterable[tuple[Range, ...]], start: int, end: int) -> None:
        """Characters as sequences of byte ranges; those that go on alike share their states."""
        shared: dict[frozenset[tuple[Range, ...]], int] = {}

        def add(tails: Iterable[tuple[Range, ...]], start: int) -> None:
            by_first: dict[Range, set[tuple[Range, ...]]] = {}
            for (low, high), *rest in tails:
                by_first.setdefault((low, high), set()).add(tuple(rest))
            for (low, high), rests in by_first.items():
                key = frozenset(rests)
                if key == {()}:
                    self.edges[start].append((low, high, end))
                    continue
                if key not in shared:
                    shared[key] = self.state()
                    add(key, shared[key])
                self.edges[start].append((low, high, shared[key]))

        add(sequences, start)

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """The states that can be reached without a byte."""
        found, todo = set(states), list(states)
        while todo:
            for state in self.empty[todo.pop()]:
                if state not in found:
                    found.add(state)
                    todo.append(state)
        return frozenset(found)


def _determinise(nfa: _Nfa, start: int, end: int) -> ByteAutomaton:
    numbers: dict[frozenset[int], int] = {}
    queue: list[frozenset[int]] = []
    closures: dict[frozenset[int], int] = {}
    goto: list[npt.NDArray[np.int32]] = []
    work = 0

    def number(targets: frozenset[int]) -> int:
        """The state of what lies behind these, numbered on first sight."""
        known = closures.get(targets)
        if known is None:
            # States without bytes of their own tell nothing apart, but for the end.
            subset = frozenset(s for s in nfa.closure(targets) if nfa.edges[s] or s == end)
            known = numbers.get(subset)
            if known is None:
                if len(queue) >= MAX_STATES:
                    raise TooLarge(_TOO_LARGE)
                known = numbers[subset] = len(queue)
                queue.append(subset)
            closures[targets] = known
        return known

    number(frozenset([start]))
    for subset in queue:
        row = np.full(256, -1, np.int32)
        edges = [edge for state in subset for edge in nfa.edges[state]]
        cuts = sorted({0, 256, *(low for low, _, _ in edges), *(high + 1 for _, high, _ in edges)})
        work += len(subset) + len(edges) * len(cuts)
        if work > _MAX_WORK:  # few states can be sets of many
            raise TooLarge(_TOO_LARGE)
        for low, beyond in pairwise(cuts):
            targets = frozenset(target for first, last, target in edges if first <= low <= last)
            if targets:
                row[low:beyond] = number(targets)
        goto.append(row)
    accepts = np.array([end in subset for subset in queue])
    return ByteAutomaton(np.stack(goto), accepts)
