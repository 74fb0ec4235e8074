"""Deterministic automata over bytes: products, and the smallest automaton of the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from batchmix.structured_output.pattern import TooLarge

Ints: TypeAlias = npt.NDArray[np.intp]
Edge: TypeAlias = tuple[int, int, int]  # first byte, last byte, next state

NEVER_ENDS = 2**30  # steps to an end that cannot be reached
_MAX_PRODUCT = 4_096  # states of a product before it is made small
_MAX_ROUNDS = 100  # of making an automaton smallest
_TOO_LARGE = "the automaton of limits that hold at once is too large; shorten them"


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
        found: npt.NDArray[np.bool_] = np.logical_or.reduce(self._begins)
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
    begins = np.logical_or.reduce([one.begins for one in automata])
    sizes = [len(one.accepts) + 1 for one in automata]  # the last state is for no text
    units = [
        prod(sizes[place + 1 :]) for place in range(len(sizes))
    ]  # a state of the product is a number with these digits
    if prod(sizes) >= 2**62:
        raise TooLarge(_TOO_LARGE)
    narrow = [np.append(np.where(one.goto[:, begins] < 0, len(one.goto), one.goto[:, begins]),
                        np.full((1, begins.sum()), len(one.goto)), 0) for one in automata]  # fmt: skip
    numbers, frontier = {0: 0}, np.zeros(1, np.int64)
    rows, accepts = [], []
    while len(frontier):
        digits = [frontier // unit % size for unit, size in zip(units, sizes, strict=True)]
        accepting = [np.append(one.accepts, False)[digit] for one, digit in zip(automata, digits, strict=True)]
        accepts.append(
            np.all(accepting[: len(items)], 0) & ~np.any([np.zeros_like(accepting[0]), *accepting[len(items) :]], 0)
        )
        after = [one[digit] for one, digit in zip(narrow, digits, strict=True)]
        ends = np.any([one == size - 1 for one, size in zip(after[: len(items)], sizes, strict=False)], 0)
        code = np.where(ends, -1, sum(one.astype(np.int64) * unit for one, unit in zip(after, units, strict=True)))
        rows.append(code)
        new = [one for one in np.unique(code).tolist() if one >= 0 and one not in numbers]
        if len(numbers) + len(new) > _MAX_PRODUCT:
            raise TooLarge(_TOO_LARGE)
        numbers.update(zip(new, range(len(numbers), len(numbers) + len(new)), strict=True))
        frontier = np.array(new, np.int64)
    codes = np.array(sorted(numbers))
    number = np.array([numbers[code] for code in codes.tolist()], np.int32)
    found = np.concatenate(rows)
    goto = np.where(found < 0, -1, number[np.searchsorted(codes, np.maximum(found, 0))]).astype(np.int32)
    return minimised(ByteAutomaton(goto[:, np.cumsum(begins) - 1], np.concatenate(accepts)))


def minimised(automaton: ByteAutomaton) -> ByteAutomaton:
    """The automaton of the same texts with the fewest states, none where it has no text."""
    byte_class, accepts = np.cumsum(automaton.begins) - 1, automaton.accepts
    narrow = automaton.goto[:, automaton.begins]  # [S, classes of bytes]
    leads = steps_to_end(narrow, accepts) < NEVER_ENDS
    if not leads[:1].any():
        return ByteAutomaton(np.zeros((0, 256), np.int32), np.zeros(0, np.bool_))
    narrow = np.where((narrow >= 0) & leads[narrow], narrow, -1)
    labels = _finite_labels(narrow, accepts)
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


def steps_to_end(following: npt.NDArray[np.int32], accepts: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The fewest steps from each state to an accepting one, NEVER_ENDS where there is none. [S]; `following` [S, symbols]."""
    source, column = np.nonzero(following >= 0)
    to = following[source, column]
    source = source[
        np.argsort(to.astype(np.uint16) if len(accepts) < 2**16 else to, kind="stable")
    ]  # 16 bits: by radix
    first = np.append(0, np.cumsum(np.bincount(to, minlength=len(accepts))))
    found = np.full(len(accepts), NEVER_ENDS, np.int64)
    frontier = np.flatnonzero(accepts)
    steps = 0
    while len(frontier):
        found[frontier] = steps
        steps += 1
        before = np.zeros(len(accepts), np.bool_)
        for low, high in zip(first[frontier].tolist(), first[frontier + 1].tolist(), strict=True):
            before[source[low:high]] = True
        frontier = np.flatnonzero(before & (found == NEVER_ENDS))
    return found


def _finite_labels(narrow: npt.NDArray[np.int32], accepts: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Labels that states share which have the same texts, where those are finitely many; others have one of two. [S]."""
    rows = narrow.tolist()
    before: list[list[int]] = [[] for _ in rows]
    left = []  # by state: next states that have no label yet
    for state, row in enumerate(rows):
        after = set(row) - {-1}
        left.append(len(after))
        for to in after:
            before[to].append(state)
    labels = [*accepts.tolist(), -1]  # the last is of no state
    known: dict[tuple[int, ...], int] = {}
    todo = [state for state, count in enumerate(left) if not count]
    while todo:
        state = todo.pop()
        key = int(accepts[state]), *(labels[to] for to in rows[state])
        labels[state] = known.setdefault(key, 2 + len(known))
        for one in before[state]:
            left[one] -= 1
            if not left[one]:
                todo.append(one)
    return np.unique(np.array(labels[:-1], np.int64), return_inverse=True)[1]


def _refined(narrow: npt.NDArray[np.int32], labels: npt.NDArray[np.int64], salt: int) -> npt.NDArray[np.int64]:
    """Labels that states share whose next states have the same labels (Moore), by sums of random words; [S].

    After `_MAX_ROUNDS` each state has one of its own: the automaton is then not the smallest.
    """
    words = np.random.default_rng(salt).integers(1, 2**63, (narrow.shape[1] + 1, len(narrow) + 2), np.uint64)
    column = np.arange(narrow.shape[1])
    for _ in range(_MAX_ROUNDS):
        after = np.where(narrow >= 0, labels[narrow], -1)  # -1 is the last word
        sums = words[-1][labels] + words[column, after].sum(1, dtype=np.uint64)
        _, finer = np.unique(sums, return_inverse=True)
        finer = finer.reshape(-1).astype(np.int64)
        if finer.max() == labels.max() and len(np.unique(labels)) == finer.max() + 1:
            return finer
        labels = finer
    return np.arange(len(narrow))


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
