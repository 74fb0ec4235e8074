"""Patterns as deterministic automata over the bytes of UTF-8 text.

Parts without graphs (strings, numbers, formats) are made smallest on their own, once per process. What is left, objects and
arrays, is put together from the end, so that parts that go on alike are one (nfa.py). All is bounded: a pattern whose
automaton would be too large is refused instead of filling the memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from batchmix.structured_output.automata import ByteAutomaton, minimised, product
from batchmix.structured_output.nfa import MAX_STATES, TOO_LARGE, Nfa
from batchmix.structured_output.pattern import (
    EMPTY,
    NEVER,
    Alt,
    Both,
    Chars,
    Graph,
    NoText,
    Pattern,
    Range,
    Repeat,
    Seq,
    TooLarge,
    has_graph,
    seq,
    utf8,
)

_MAX_MINIMISED = 2_000  # states of a part; making a larger one smallest takes longer than it saves


def build_automaton(pattern: Pattern) -> ByteAutomaton:
    """The automaton of the UTF-8 texts of a pattern. Unsupported where there is none or it would be too large."""
    if pattern == NEVER:
        raise NoText
    try:
        if has_graph(pattern) and not isinstance(pattern, Both):
            return _built(pattern, True)
        return _automaton(pattern)
    except RecursionError:  # a pattern within a pattern, for each of the 308 digits of a bound
        raise TooLarge(TOO_LARGE) from None


def both(items: Iterable[Pattern], without: Iterable[Pattern] = ()) -> Pattern:
    """The texts of all `items` that none of `without` has, NEVER where it is seen that there is none."""
    items, without = tuple(dict.fromkeys(items)), tuple(one for one in dict.fromkeys(without) if one != NEVER)
    if NEVER in items:
        return NEVER
    if len(items) == 1 and not without:
        return items[0]
    found = Both(items, without)
    try:
        return found if len(build_automaton(found).accepts) else NEVER
    except TooLarge:
        return found


def _automaton(part: Pattern) -> ByteAutomaton:
    """The automaton of limits that hold at once, or of another part without graphs. Made once as long as it is kept."""
    found = _KEPT.get(part)
    if found is None:
        try:
            if isinstance(part, Both):
                items, without = ([build_automaton(one) for one in some] for some in (part.items, part.without))
                found = product(items, without)
            else:
                found = _built(part, False)
        except TooLarge as error:
            found = str(error)
        _KEPT.put(part, found)
    if isinstance(found, str):
        raise TooLarge(found)
    return found


class _Kept:
    """Automata by pattern, or why they are too large: those that were used last, up to so many states."""

    def __init__(self, most: int) -> None:
        self._most, self._states = most, 0
        self._found: OrderedDict[Pattern, ByteAutomaton | str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, pattern: Pattern) -> ByteAutomaton | str | None:
        with self._lock:
            if pattern in self._found:
                self._found.move_to_end(pattern)
            return self._found.get(pattern)

    def put(self, pattern: Pattern, found: ByteAutomaton | str) -> None:
        with self._lock:
            if pattern not in self._found:
                self._found[pattern] = found
                self._states += self._size(found)
            while self._states > self._most:
                self._states -= self._size(self._found.popitem(last=False)[1])

    @staticmethod
    def _size(found: ByteAutomaton | str) -> int:
        return 1 if isinstance(found, str) else 1 + len(found.accepts)


_KEPT = _Kept(50_000)  # a kilobyte or two each


def _built(pattern: Pattern, by_pieces: bool) -> ByteAutomaton:
    nfa = Nfa()
    found = nfa.determinised(_Parts(nfa, by_pieces).before(pattern, nfa.end))
    if not len(found.accepts):
        raise NoText
    worth = not by_pieces and nfa.num_subsets and len(found.accepts) <= _MAX_MINIMISED
    return minimised(found) if worth else found


class _Parts:
    """The parts of a pattern in an automaton to be; parts that are equal and go on alike are one."""

    def __init__(self, nfa: Nfa, by_pieces: bool) -> None:
        """`by_pieces`: parts without graphs are copied from automata of their own."""
        self._nfa, self._by_pieces = nfa, by_pieces
        self._known: dict[tuple[Pattern, int], int] = {}

    def before(self, pattern: Pattern, after: int) -> int:
        """The state from which the pattern's texts lead to `after`."""
        key = pattern, after
        if key not in self._known:
            self._known[key] = self._made(pattern, after)
        return self._known[key]

    def _made(self, pattern: Pattern, after: int) -> int:
        if isinstance(pattern, Seq):
            return self._sequence(list(pattern.items), after)
        if isinstance(pattern, Chars):
            return self._nfa.block(_characters(pattern.ranges), after)
        if isinstance(pattern, Both):
            return self._nfa.block(_automaton(pattern), after)
        if self._by_pieces and not has_graph(pattern):
            return self._nfa.block(_automaton(pattern), after)
        if isinstance(pattern, Alt):
            return self._nfa.node([self.before(item, after) for item in pattern.items])
        if isinstance(pattern, Graph):
            return self._graph(pattern, after)
        assert isinstance(pattern, Repeat), "no finite automaton follows a rule"
        if pattern.high is None:
            start = self._nfa.node([after])
            self._nfa.add_way(start, self.before(pattern.item, start))
        elif not self._by_pieces and (found := _counted(pattern)) is not None:
            return self._nfa.block(found, after)
        else:
            start = after
            for _ in range(pattern.high - pattern.low):
                start = self._nfa.node([after, self.before(pattern.item, start)])
        for _ in range(pattern.low):
            start = self.before(pattern.item, start)
        return start

    def _sequence(self, items: list[Pattern], after: int) -> int:
        while items:
            if data := _last_bytes(items):
                after = self._nfa.literal(data, after)
            elif self._by_pieces and not has_graph(items[-1]):
                start = len(items)
                while start and not has_graph(items[start - 1]):
                    start -= 1
                after = self._nfa.block(_automaton(seq(items[start:])), after)
                del items[start:]
            else:
                after = self.before(items.pop(), after)
        return after

    def _graph(self, pattern: Graph, after: int) -> int:
        nodes = {node: self._nfa.node() for edge in pattern.edges for node in (edge[0], edge[2])}
        for before, item, to in pattern.edges:
            self._nfa.add_way(nodes[before], nodes[to] if item == EMPTY else self.before(item, nodes[to]))
        self._nfa.add_way(nodes.setdefault(pattern.end, nodes[0]), after)
        return nodes[0]


def _last_bytes(items: list[Pattern]) -> bytes:
    """Takes the single characters at the end."""
    text = ""
    while items and isinstance(last := items[-1], Chars) and last.ranges[0][0] == last.ranges[-1][1]:
        text += chr(last.ranges[0][0])
        items.pop()
    return text[::-1].encode()


def _counted(pattern: Repeat) -> ByteAutomaton | None:
    """The automaton of a counted repeat, if nothing leads back to an item's start or on from its end: copies in a row."""
    item, high = build_automaton(pattern.item), pattern.high or 0
    end = int(item.accepts.argmax())
    if item.accepts.sum() > 1 or not end or item.edges[end] or (item.goto == 0).any():
        return None
    states = len(item.accepts) - 1  # of a copy, whose end is the next one's start
    if states * high > MAX_STATES:
        raise TooLarge(TOO_LARGE)
    order = np.array([state for state in range(states + 1) if state != end])
    numbers = np.append(np.where(np.arange(states + 1) > end, np.arange(states + 1) - 1, np.arange(states + 1)), -1)
    numbers[end] = states
    copy = numbers[item.goto[order]]
    goto = np.where(copy >= 0, copy + states * np.arange(high)[:, None, None], -1).reshape(-1, 256)
    accepts = np.zeros(states * high + 1, np.bool_)
    accepts[pattern.low * states :: states] = True
    return ByteAutomaton(np.append(goto, np.full((1, 256), -1), 0).astype(np.int32), accepts)


@lru_cache(maxsize=4096)
def _characters(ranges: tuple[Range, ...]) -> ByteAutomaton:
    """One character of these."""
    goto = [np.full(256, -1, np.int32), np.full(256, -1, np.int32)]  # the start, and after the character
    states: dict[frozenset[tuple[Range, ...]], int] = {}  # by what must follow

    def add(tails: Iterable[tuple[Range, ...]], state: int) -> None:
        by_first: dict[Range, set[tuple[Range, ...]]] = {}
        for (low, high), *rest in tails:
            by_first.setdefault((low, high), set()).add(tuple(rest))
        for (low, high), rests in by_first.items():
            key = frozenset(rests)
            if key == {()}:
                goto[state][low : high + 1] = 1
                continue
            if key not in states:
                states[key] = len(goto)
                goto.append(np.full(256, -1, np.int32))
                add(key, states[key])
            goto[state][low : high + 1] = states[key]

    add(utf8(ranges), 0)
    accepts = np.zeros(len(goto), np.bool_)
    accepts[1] = True
    return ByteAutomaton(np.stack(goto), accepts)
