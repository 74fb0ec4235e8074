"""Patterns as deterministic automata over the bytes of UTF-8 text.

Thompson's construction, then subsets of its states, over classes of bytes that no pattern tells apart. Both are bounded:
a pattern whose automaton would be too large is refused instead of filling the memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from batchmix.structured_output.automata import ByteAutomaton, byte_ranges, product
from batchmix.structured_output.pattern import (
    EMPTY,
    NEVER,
    Alt,
    Both,
    Chars,
    Graph,
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
_MAX_NFA_STATES = 100_000
_MAX_WORK = (
    5_000_000  # edges looked at for each range of bytes: a second; a string of up to 1,000 characters takes 8 % of it
)
_TOO_LARGE = "the automaton is too large; shorten counted repetitions (maxLength, maxItems, {low,high}) or the choices"


def build_automaton(pattern: Pattern) -> ByteAutomaton:
    """The automaton of the UTF-8 texts of a pattern. Unsupported where there is none or it would be too large."""
    if pattern == NEVER:
        raise NoText
    if _size(pattern, {}) > _MAX_NFA_STATES:
        raise TooLarge(_TOO_LARGE)
    nfa = _Nfa()
    start, end = nfa.state(), nfa.state()
    nfa.add(pattern, start, end)
    return _determinise(nfa, start, end)


def both(items: Iterable[Pattern], without: Iterable[Pattern] = ()) -> Pattern:
    """The texts of all `items` that none of `without` has, NEVER where it is seen that there is none."""
    items, without = tuple(dict.fromkeys(items)), tuple(one for one in dict.fromkeys(without) if one != NEVER)
    if NEVER in items:
        return NEVER
    if len(items) == 1 and not without:
        return items[0]
    found = Both(items, without)
    automaton = _found_automaton(found)
    return found if isinstance(automaton, str) or len(automaton.accepts) else NEVER


def _both_automaton(pattern: Both) -> ByteAutomaton:
    found = _found_automaton(pattern)
    if isinstance(found, str):
        raise TooLarge(found)
    return found


@lru_cache(maxsize=1024)
def _found_automaton(pattern: Both) -> ByteAutomaton | str:
    """The automaton, or why it is too large."""
    try:
        return product(
            [build_automaton(one) for one in pattern.items], [build_automaton(one) for one in pattern.without]
        )
    except TooLarge as error:
        return str(error)


def _size(pattern: Pattern, known: dict[Pattern, int]) -> int:
    """States that the pattern takes before they are made deterministic, about; parts that are one object are looked at once."""
    if isinstance(pattern, Chars | Named):
        return 1
    found = known.get(pattern)
    if found is None:
        if isinstance(pattern, Repeat):
            found = (_size(pattern.item, known) + 1) * (pattern.low + 1 if pattern.high is None else pattern.high)
        elif isinstance(pattern, Graph):
            found = sum(_size(item, known) + 1 for _, item, _ in pattern.edges)
        elif isinstance(pattern, Both):
            found = len(_both_automaton(pattern).accepts)
        else:
            found = sum(_size(item, known) for item in pattern.items) + 2 * len(pattern.items) * isinstance(
                pattern, Alt
            )
        known[pattern] = found
    return found


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
            self._add_bytes(pattern.ranges, start, end)
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
        elif isinstance(pattern, Graph):
            self._add_graph(pattern, start, end)
        elif isinstance(pattern, Both):
            self._add_automaton(_both_automaton(pattern), start, end)
        else:
            assert not isinstance(pattern, Named), "no finite automaton follows a rule"
            self._add_repeat(pattern, start, end)

    def _add_graph(self, pattern: Graph, start: int, end: int) -> None:
        states: dict[int, int] = {}
        for before, item, after in pattern.edges:
            for node in (before, after):
                if node not in states:
                    states[node] = self.state()
            if item == EMPTY:
                self.empty[states[before]].append(states[after])
            else:
                self.add(item, states[before], states[after])
        self.empty[start].append(states.setdefault(0, start))
        self.empty[states.setdefault(pattern.end, states[0])].append(end)

    def _add_automaton(self, automaton: ByteAutomaton, start: int, end: int) -> None:
        states = [self.state() for _ in automaton.accepts]
        for state, row, accepts in zip(states, automaton.goto, automaton.accepts, strict=True):
            self.edges[state] += [(low, high, states[after]) for low, high, after in byte_ranges(row)]
            if accepts:
                self.empty[state].append(end)
        if states:
            self.empty[start].append(states[0])

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

    def _add_bytes(self, ranges: tuple[Range, ...], start: int, end: int) -> None:
        edges, count = _byte_edges(ranges)
        first = len(self.edges)
        if count:
            if first + count > _MAX_NFA_STATES:
                raise TooLarge(_TOO_LARGE)
            self.empty += [[] for _ in range(count)]
            self.edges += [[] for _ in range(count)]
        for before, low, high, after in edges:
            self.edges[start if before < 0 else first + before].append((low, high, end if after < 0 else first + after))

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """The states that can be reached without a byte."""
        found, todo = set(states), list(states)
        while todo:
            for state in self.empty[todo.pop()]:
                if state not in found:
                    found.add(state)
                    todo.append(state)
        return frozenset(found)


@lru_cache(maxsize=4096)
def _byte_edges(ranges: tuple[Range, ...]) -> tuple[tuple[tuple[int, int, int, int], ...], int]:
    """Characters as (state, first byte, last byte, next state), and the number of states between: -1 is before or after all.

    Sequences of byte ranges that go on alike share their states.
    """
    shared: dict[frozenset[tuple[Range, ...]], int] = {}
    edges: list[tuple[int, int, int, int]] = []

    def add(tails: Iterable[tuple[Range, ...]], start: int) -> None:
        by_first: dict[Range, set[tuple[Range, ...]]] = {}
        for (low, high), *rest in tails:
            by_first.setdefault((low, high), set()).add(tuple(rest))
        for (low, high), rests in by_first.items():
            key = frozenset(rests)
            if key == {()}:
                edges.append((start, low, high, -1))
                continue
            if key not in shared:
                shared[key] = len(shared)
                add(key, shared[key])
            edges.append((start, low, high, shared[key]))

    add(utf8(ranges), -1)
    return tuple(edges), len(shared)


def _overlap(edges: list[tuple[int, int, int]]) -> bool:
    """Whether two edges have a byte in common."""
    if len(edges) < 2:
        return False
    return any(left[1] >= right[0] for left, right in pairwise(sorted(edges)))


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
        if not _overlap(edges):
            work += len(edges)
            for low, high, target in edges:
                row[low : high + 1] = number(frozenset((target,)))
            goto.append(row)
            continue
        cuts = sorted({0, 256, *(low for low, _, _ in edges), *(high + 1 for _, high, _ in edges)})
        work += len(subset) + len(edges) * len(cuts)
        if work > _MAX_WORK:  # few states can be sets of many
            raise TooLarge(_TOO_LARGE)
        place = {cut: i for i, cut in enumerate(cuts)}
        targets: list[list[int]] = [[] for _ in cuts]
        for low, high, target in edges:
            for i in range(place[low], place[high + 1]):
                targets[i].append(target)
        for i, (low, beyond) in enumerate(pairwise(cuts)):
            if targets[i]:
                row[low:beyond] = number(frozenset(targets[i]))
        goto.append(row)
    accepts = np.array([end in subset for subset in queue])
    return ByteAutomaton(np.stack(goto), accepts)
