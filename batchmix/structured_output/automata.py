"""Deterministic automata over bytes: products, and the smallest automaton of the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from batchmix.structured_output.pattern import TooLarge

Ints: TypeAlias = npt.NDArray[np.intp]
Edge: TypeAlias = tuple[int, int, int]  # first byte, last byte, next state

_MAX_PRODUCT = 4_096  # states of a product before it is made small


@dataclass(frozen=True)
class ByteAutomaton:
    """`state = goto[state, byte]` from state 0, -1 where no text goes on like that; `accepts[state]`: a whole text."""

    goto: npt.NDArray[np.int32]  # [num_states, 256]
    accepts: npt.NDArray[np.bool_]  # [num_states]

    def has(self, text: str) -> bool:
        """Whether this is one of the texts."""
        state = 0 if len(self.accepts) else -1
        for byte in text.encode(errors="surrogatepass"):
            state = int(self.goto[state, byte]) if state >= 0 else -1
        return state >= 0 and bool(self.accepts[state])

    @cached_property
    def edges(self) -> list[list[Edge]]:
        """By state the runs of bytes that lead to one state."""
        found: list[list[Edge]] = [[] for _ in self.accepts]
        state, low = np.nonzero(self._begins)
        last = np.append(low[1:], 0) - 1
        last[last < low] = 255  # of the state's last run
        after = self.goto[state, low]
        for one, first, end, to in zip(*(part[after >= 0].tolist() for part in (state, low, last, after)), strict=True):
            found[one].append((first, end, to))
        return found

    @cached_property
    def _begins(self) -> npt.NDArray[np.bool_]:
        """By state whether a byte leads elsewhere than the one before it. [S, 256]."""
        return np.column_stack((np.ones(len(self.goto), np.bool_), self.goto[:, 1:] != self.goto[:, :-1]))

    @cached_property
    def begins(self) -> npt.NDArray[np.bool_]:
        """Whether a state tells a byte from the one before it. [256]."""
        found: npt.NDArray[np.bool_] = self._begins.any(0)
        return found

    def reachable(self, state: int) -> tuple[Ints, Ints]:
        """The states that are reached from one before any accepting state, itself included, and those accepting ones."""
        known = self._reachable.get(state)
        if known is None:
            inside, accepting, todo = {state: None}, dict[int, None](), [state]
            while todo:
                for _, _, to in self.edges[todo.pop()]:
                    if self.accepts[to]:
                        accepting[to] = None
                    elif to not in inside:
                        inside[to] = None
                        todo.append(to)
            known = self._reachable[state] = np.array(list(inside), np.intp), np.array(list(accepting), np.intp)
        return known

    @cached_property
    def _reachable(self) -> dict[int, tuple[Ints, Ints]]:
        return {}


def product(items: Sequence[ByteAutomaton], without: Sequence[ByteAutomaton]) -> ByteAutomaton:
    """The smallest automaton of the texts that all `items` have and none of `without`; no states where there is none.

    TooLarge where it has too many states on the way there.
    """
    automata = [*items, *without]
    kinds = np.zeros(256, np.int64)  # of bytes: those that no automaton tells apart
    for one in automata:
        _, found = np.unique(one.goto, axis=1, return_inverse=True)
        _, kinds = np.unique(kinds * 256 + found.reshape(-1), return_inverse=True)
    first = np.unique(kinds, return_index=True)[1]
    narrow = [one.goto[:, first].tolist() for one in automata]
    nowhere = [-1] * len(first)
    start = (0,) * len(automata)
    numbers, queue = {start: 0}, [start]
    rows: list[list[int]] = []
    accepts: list[bool] = []
    for states in queue:  # grows while it is read
        accepting = [state >= 0 and bool(one.accepts[state]) for one, state in zip(automata, states, strict=True)]
        accepts.append(all(accepting[: len(items)]) and not any(accepting[len(items) :]))
        row = []
        columns = [one[state] if state >= 0 else nowhere for one, state in zip(narrow, states, strict=True)]
        for after in zip(*columns, strict=True):
            if min(after[: len(items)]) < 0:
                row.append(-1)
                continue
            if after not in numbers:
                if len(queue) >= _MAX_PRODUCT:
                    raise TooLarge("the automaton of limits that hold at once is too large; shorten them")
                numbers[after] = len(queue)
                queue.append(after)
            row.append(numbers[after])
        rows.append(row)
    return minimised(ByteAutomaton(np.array(rows, np.int32)[:, kinds], np.array(accepts)))


def minimised(automaton: ByteAutomaton) -> ByteAutomaton:
    """The automaton of the same texts with the fewest states, none where it has no text."""
    byte_class, accepts = np.cumsum(automaton.begins) - 1, automaton.accepts
    narrow = automaton.goto[:, automaton.begins]  # [S, classes of bytes]
    leads = accepts.copy()
    while True:
        more = leads | (leads[narrow] & (narrow >= 0)).any(1)
        if (more == leads).all():
            break
        leads = more
    if not leads[0]:
        return ByteAutomaton(np.zeros((0, 256), np.int32), np.zeros(0, np.bool_))
    narrow = np.where((narrow >= 0) & leads[narrow], narrow, -1)
    labels = (accepts & leads).astype(np.int64) + leads
    for salt in range(8):  # other random words if two states that differ have one sum
        labels = _refined(narrow, labels, salt)
        first = np.unique(labels, return_index=True)[1]
        after = np.where(narrow >= 0, labels[narrow], -1)
        if (after == after[first][labels]).all() and (accepts == accepts[first][labels]).all():
            break
    else:
        raise AssertionError("states that differ have one sum, eight times")
    # Numbered as they are met, from the start.
    order, numbers = [0], {int(labels[0]): 0}
    for state in order:
        for after in dict.fromkeys(narrow[state].tolist()):
            if after >= 0 and int(labels[after]) not in numbers:
                numbers[int(labels[after])] = len(order)
                order.append(after)
    renumber = np.full(int(labels.max()) + 2, -1, np.int32)
    for label, number in numbers.items():
        renumber[label] = number
    small = np.where(narrow[order] >= 0, renumber[labels[narrow[order]]], -1).astype(np.int32)
    return ByteAutomaton(small[:, byte_class], accepts[order])


def _refined(narrow: npt.NDArray[np.int32], labels: npt.NDArray[np.int64], salt: int) -> npt.NDArray[np.int64]:
    """Labels that states share whose next states have the same labels (Moore), by sums of random words; [S]."""
    words = np.random.default_rng(salt).integers(1, 2**63, (narrow.shape[1] + 1, len(narrow) + 2), np.uint64)
    column = np.arange(narrow.shape[1])
    while True:
        after = np.where(narrow >= 0, labels[narrow], -1)  # -1 is the last word
        sums = words[-1][labels] + words[column, after].sum(1, dtype=np.uint64)
        _, finer = np.unique(sums, return_inverse=True)
        finer = finer.reshape(-1).astype(np.int64)
        if finer.max() == labels.max() and len(np.unique(labels)) == finer.max() + 1:
            return finer
        labels = finer


def finite_texts(automaton: ByteAutomaton, most: int) -> list[str] | None:
    """All texts in the order of their bytes, None where there are more than `most`."""
    found: list[str] = []
    todo: list[tuple[int, bytes]] = [(0, b"")]
    small = minimised(automaton)
    if not len(small.accepts):
        return found
    while todo:
        state, text = todo.pop()
        if len(text) > len(small.accepts) or len(todo) > 256 * most:  # a loop, or too many
            return None
        if small.accepts[state]:
            found.append(text.decode())
            if len(found) > most:
                return None
        todo += [
            (int(small.goto[state, byte]), text + bytes([byte]))
            for byte in np.flatnonzero(small.goto[state] >= 0)[::-1]
        ]
    return found
