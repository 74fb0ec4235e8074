"""Automata put together from blocks that are deterministic already, and made deterministic where they are not as a whole.

A block is a literal or a finished automaton. Ways without a byte lead from a block's accepting states, and from nodes, to
what comes after. A state that no such way leaves stands for itself in the result, so that only the others, where two parts
may go on with the same byte, are looked at as subsets.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from batchmix.structured_output.automata import ByteAutomaton, Edge
from batchmix.structured_output.pattern import TooLarge

MAX_STATES = 10_000  # of an automaton: half a second over 32,000 tokens; a string of up to 1,000 characters takes 9,000
_MAX_NFA_STATES = 50_000  # a kilobyte each
_MAX_WORK = 1_000_000  # edges looked at for each range of bytes: half a second
TOO_LARGE = "the automaton is too large; shorten counted repetitions (maxLength, maxItems, {low,high}) or the choices"


class Nfa:
    """Built from the end: what a part leads to is there before the part."""

    def __init__(self) -> None:
        self._count = 0
        self._blocks: list[ByteAutomaton | tuple[bytes, int]] = []  # automata, and literals with the state after them
        self._firsts: list[int] = []  # of each block the first state
        self._empty: dict[int, list[int]] = {}  # by state: where one may go on without a byte
        self._hollow: set[int] = set()  # states that no byte leaves
        self._targets: set[int] = set()  # states that a byte leads to and that a way without one may leave
        self._cores: dict[int, frozenset[int]] = {}
        self._joined: dict[int, int] = {}  # by first state of a block: whose bytes its accepting states have besides
        self.num_subsets = 0
        self.end = self._new(1)

    def _new(self, count: int) -> int:
        self._count += count
        if self._count > _MAX_NFA_STATES:
            raise TooLarge(TOO_LARGE)
        return self._count - count

    def node(self, ways: Iterable[int] = ()) -> int:
        """A state from which one may go on as from any of `ways`."""
        state = self._new(1)
        self._empty[state] = list(ways)
        self._hollow.add(state)
        return state

    def add_way(self, node: int, to: int) -> None:
        """One more way from a node, before `determinised`."""
        self._empty[node].append(to)

    def literal(self, data: bytes, after: int) -> int:
        """The bytes, and then as from `after`."""
        if not data:
            return after
        first = self._new(len(data))
        self._blocks.append((data, after))
        self._firsts.append(first)
        self._targets.add(after)
        return first

    def block(self, automaton: ByteAutomaton, after: int) -> int:
        """A text of the automaton, and then as from `after`."""
        first = self._new(len(automaton.accepts))
        self._blocks.append(automaton)
        self._firsts.append(first)
        states = np.flatnonzero(automaton.accepts)
        more = [] if after in self._empty or not any(automaton.edges[state] for state in states) else self._edges(after)
        if more and not any((automaton.goto[states, low : high + 1] >= 0).any() for low, high, _ in more):
            self._joined[first] = after  # where no byte is of both, an accepting state goes on as both
            return first
        for state in states.tolist():
            self._empty[first + state] = [after]
            self._targets.add(first + state)
            if not automaton.edges[state]:
                self._hollow.add(first + state)
        return first

    def _edges(self, state: int) -> list[Edge]:
        if state == self.end:
            return []
        place = bisect_right(self._firsts, state) - 1
        block, first = self._blocks[place], self._firsts[place]
        if isinstance(block, ByteAutomaton):
            more = self._after(first) if block.accepts[state - first] else []
            return [(low, high, first + to) for low, high, to in block.edges[state - first]] + more
        data, after = block
        byte = data[state - first]
        return [(byte, byte, after if state - first == len(data) - 1 else state + 1)]

    def _after(self, first: int) -> list[Edge]:
        """What the accepting states of a block have besides their own bytes."""
        return self._edges(self._joined[first]) if first in self._joined else []

    def _core(self, state: int) -> frozenset[int]:
        """The states with bytes, and the end, that can be reached without a byte."""
        known = self._cores.get(state)
        if known is None:
            found, todo = {state}, [state]
            while todo:
                for to in self._empty.get(todo.pop(), ()):
                    if to not in found:
                        found.add(to)
                        todo.append(to)
            known = self._cores[state] = frozenset(found - self._hollow)
        return known

    def determinised(self, start: int) -> ByteAutomaton:
        """The automaton of the texts from `start` to the end; no states where there is none."""
        subsets = _Subsets(self._count)
        first = subsets.number(self._core(start))
        final = np.arange(self._count + 1, dtype=np.int32)  # by state the one in its place; the last is -1, for none
        final[-1] = -1
        for state in self._targets:
            if state in self._empty:
                final[state] = subsets.number(self._core(state))
        rows: list[list[Edge]] = []  # of the subsets
        for subset in subsets.queue:  # grows while it is read
            edges = [edge for state in subset for edge in self._edges(state)]
            rows.append([(low, high, self._number(states, subsets)) for low, high, states in subsets.apart(edges)])
        self.num_subsets = len(rows)
        if first < 0:
            return ByteAutomaton(np.zeros((0, 256), np.int32), np.zeros(0, np.bool_))
        reached = self._reached(first, final, rows)
        if len(reached) > MAX_STATES:
            raise TooLarge(TOO_LARGE)
        first_byte, byte_class = self._byte_classes()
        narrow = np.full((self._count + len(rows), len(first_byte)), -1, np.int32)
        for block, at in zip(self._blocks, self._firsts, strict=True):
            if isinstance(block, ByteAutomaton):
                part = block.goto[:, first_byte]
                narrow[at : at + len(part)] = final[np.where(part >= 0, part + at, -1)]
                for low, high, to in self._after(at):
                    narrow[at + np.flatnonzero(block.accepts), byte_class[low] : byte_class[high] + 1] = final[to]
        texts = [(at, *block) for block, at in zip(self._blocks, self._firsts, strict=True) if isinstance(block, tuple)]
        places = np.array([place for at, data, _ in texts for place in range(at, at + len(data))], np.intp)
        following = [to for at, data, after in texts for to in (*range(at + 1, at + len(data)), after)]
        data = np.frombuffer(b"".join(data for _, data, _ in texts), np.uint8)
        narrow[places, byte_class[data]] = final[np.array(following, np.intp)]
        for number, edges in enumerate(rows, self._count):
            for low, high, to in edges:
                narrow[number, byte_class[low] : byte_class[high] + 1] = to
        numbers = np.full(len(narrow) + 1, -1, np.int32)
        numbers[reached] = np.arange(len(reached))
        accepts = np.zeros(len(narrow), np.bool_)
        accepts[[self.end, *(n for n, subset in enumerate(subsets.queue, self._count) if self.end in subset)]] = True
        return ByteAutomaton(numbers[narrow[reached]][:, byte_class], accepts[reached])

    def _number(self, states: list[int], subsets: _Subsets) -> int:
        if len(states) == 1:
            return subsets.number(self._core(states[0])) if states[0] in self._empty else states[0]
        found: set[int] = set()
        for state in states:
            if state in self._empty:
                found |= self._core(state)
            else:
                found.add(state)
        return subsets.number(frozenset(found))

    def _byte_classes(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Runs of bytes that no block tells apart: the first of each, and by byte the number of its run."""
        begins = np.zeros(257, np.bool_)
        begins[0] = True
        for automaton in {id(block): block for block in self._blocks if isinstance(block, ByteAutomaton)}.values():
            begins[:256] |= automaton.begins
        bytes_of = np.unique(
            np.frombuffer(b"".join(block[0] for block in self._blocks if isinstance(block, tuple)), np.uint8)
        )
        begins[bytes_of] = True
        begins[bytes_of.astype(np.intp) + 1] = True
        return np.flatnonzero(begins[:256]), np.cumsum(begins[:256]) - 1

    def _reached(self, start: int, final: npt.NDArray[np.int32], rows: list[list[Edge]]) -> npt.NDArray[np.intp]:
        """The states that can be reached, `start` first."""
        found = np.zeros(self._count + len(rows), np.bool_)
        todo = [start]
        while todo:
            state = todo.pop()
            if state < 0 or found[state]:
                continue
            found[state] = True
            if state >= self._count:
                todo += [to for _, _, to in rows[state - self._count]]
            elif state != self.end:
                place = bisect_right(self._firsts, state) - 1
                block, first = self._blocks[place], self._firsts[place]
                if isinstance(block, ByteAutomaton):
                    joined = [int(final[to]) for _, _, to in self._after(first)]
                    if joined and state == first:  # from which all states of a block are reached
                        found[first : first + len(block.accepts)] = True
                        todo += joined
                        continue
                    inside, accepting = block.reachable(state - first)
                    found[inside + first] = True
                    todo += [*final[accepting + first].tolist(), *(joined if block.accepts[state - first] else ())]
                else:
                    found[state : first + len(block[0])] = True
                    todo.append(int(final[block[1]]))
        found[start] = False
        return np.append(start, np.flatnonzero(found))


class _Subsets:
    """Sets of states, numbered as they are met; a set of one state has that state's number."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._numbers: dict[frozenset[int], int] = {}
        self._work = 0
        self.queue: list[frozenset[int]] = []

    def number(self, subset: frozenset[int]) -> int:
        if len(subset) < 2:
            return next(iter(subset), -1)
        known = self._numbers.get(subset)
        if known is None:
            if len(self.queue) >= MAX_STATES:
                raise TooLarge(TOO_LARGE)
            known = self._numbers[subset] = self._first + len(self.queue)
            self.queue.append(subset)
        return known

    def apart(self, edges: list[Edge]) -> list[tuple[int, int, list[int]]]:
        """Ranges of bytes that do not overlap, with the states that each leads to."""
        edges.sort()
        if all(left[1] < right[0] for left, right in pairwise(edges)):
            self._work += len(edges)
            return [(low, high, [to]) for low, high, to in edges]
        cuts = sorted({cut for low, high, _ in edges for cut in (low, high + 1)})
        place = {cut: i for i, cut in enumerate(cuts)}
        targets: list[list[int]] = [[] for _ in cuts]
        for low, high, to in edges:
            first, beyond = place[low], place[high + 1]
            self._work += beyond - first
            for i in range(first, beyond):
                targets[i].append(to)
        if self._work > _MAX_WORK:  # few states can be sets of many
            raise TooLarge(TOO_LARGE)
        return [
            (low, beyond - 1, states) for (low, beyond), states in zip(pairwise(cuts), targets, strict=False) if states
        ]
