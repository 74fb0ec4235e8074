"""An automaton over bytes as one over a vocabulary's tokens, where tokens that no state tells apart form a class.

Most states allow few tokens, which walk through the automaton byte by byte. The others are inside strings, where many tokens
lead to the same states: those walk as one (string_states.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from batchmix.structured_output.string_states import QUOTES, Inside, StringStates, check_entries
from batchmix.structured_output.trie import Ints, TokenTrie, Tree

Words = npt.NDArray[np.uint64]
_BLOCK_STATES = 1024  # walked together


def token_classes(
    goto: npt.NDArray[np.int32],
    trie: TokenTrie,
    drops_leading_space: bool,
    only: Mapping[int, int],
    only_first: int | None,
) -> tuple[npt.NDArray[np.int32], Ints]:
    """The state after each class of tokens, [S + 1, C], -1: none, and the class of each token, [V].

    `goto` [S, 256] is the automaton; the last state is that of a text without bytes, which differs from state 0 where a
    leading space is dropped. A state that `only` has, and the text's start if `only_first` is given, allows that token alone,
    unless it does not allow it at all. TooLarge where it takes too long.
    """
    num_states = len(goto)
    inside = StringStates(goto, trie, only)
    others = np.delete(np.arange(num_states), inside.states)
    parts: list[Triples] = [_start(trie, goto, drops_leading_space, only_first)]
    for low in range(0, len(others), _BLOCK_STATES):
        parts.append(_kept(_walked(trie.tree, goto, others[low : low + _BLOCK_STATES]), only, num_states))
        check_entries(sum(len(part[0]) for part in parts))
    strings = []
    if len(inside.states):
        parts.append(_walked(trie.having(QUOTES), goto, inside.states))
        strings = inside.insides()
    origin, token, after = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    group, columns = _joint(strings, trie.num_tokens)
    groups = int(group.max()) + 1
    # Tokens that the triples name; the others do as their group does.
    named = np.zeros(trie.num_tokens, np.bool_)
    named[token] = True
    tokens = np.flatnonzero(named)
    place = np.zeros(trie.num_tokens, np.int64)
    place[tokens] = groups + np.arange(len(tokens))
    group_of = np.concatenate((np.arange(groups), group[tokens]))
    sizes = np.bincount(place[token], minlength=len(group_of))
    for one, column in zip(strings, columns, strict=True):
        sizes += (one.after >= 0).sum(0)[column[group_of]]
    for salt in range(8):  # classes by sums of random words; other words if two that differ have one sum
        sums = np.zeros(len(group_of), np.uint64)
        np.add.at(sums, place[token], _mixed(origin, after, salt))
        for one, column in zip(strings, columns, strict=True):
            words = np.where(one.after >= 0, _mixed(one.states[:, None], one.after, salt), np.uint64(0))
            sums += words.sum(0, dtype=np.uint64)[column[group_of]]
        _, first, classes = np.unique(sums, return_index=True, return_inverse=True)
        token_class = classes[group]
        token_class[tokens] = classes[groups:]
        table = np.full((num_states + 1, len(first)), -1, np.int32)
        for one, column in zip(strings, columns, strict=True):
            table[one.states] = one.after[:, column[group_of[first]]]
        for_class = first[token_class[token]] == place[token]
        table[origin[for_class], token_class[token[for_class]]] = after[for_class]
        if (
            (sizes == sizes[first[classes]]).all()
            and (table[origin, token_class[token]] == after).all()
            and all(_holds(table, one, column[group_of], classes) for one, column in zip(strings, columns, strict=True))
        ):
            return _used(table, token_class)
    raise AssertionError("tokens that differ have one sum, eight times")


Triples = tuple[Ints, Ints, Ints]  # states, tokens, states after them


def _joint(strings: Sequence[Inside], num_tokens: int) -> tuple[Ints, list[Ints]]:
    """The group of each token, [V], of those that are of one group everywhere; and by those the groups in each of `strings`."""
    if len(strings) == 1:
        return strings[0].group, [np.arange(strings[0].after.shape[1])]
    found = np.zeros(num_tokens, np.int64)
    for one in strings:
        found = np.unique(found * one.after.shape[1] + one.group, return_inverse=True)[1]
    first = np.unique(found, return_index=True)[1]
    return found, [one.group[first] for one in strings]


def _holds(table: npt.NDArray[np.int32], inside: Inside, column: Ints, classes: Ints) -> bool:
    """Whether the classes lead where the groups do."""
    pairs = np.unique(column << 32 | classes)
    expected = inside.after[:, pairs >> 32]
    return bool(((table[inside.states][:, pairs & (2**32 - 1)] == expected) | (expected < 0)).all())


def _walked(tree: Tree, goto: npt.NDArray[np.int32], states: Ints, node: int = 0) -> Triples:
    origin, token, after = tree.walk(goto, states, node)
    return states[origin], token, after


def _kept(triples: Triples, only: Mapping[int, int], num_states: int) -> Triples:
    """Without tokens that a state of `only` is not to allow."""
    if not only:
        return triples
    origin, token, after = triples
    wanted = np.full(num_states, -1, np.int64)
    wanted[list(only)] = list(only.values())
    found = np.zeros(num_states, np.bool_)
    found[origin[token == wanted[origin]]] = True  # the vocabulary at hand may lack it
    keep = ~found[origin] | (token == wanted[origin])
    return origin[keep], token[keep], after[keep]


def _start(trie: TokenTrie, goto: npt.NDArray[np.int32], drops_leading_space: bool, only: int | None) -> Triples:
    """The first tokens of a text."""
    start = np.zeros(1, np.int64)
    _, token, after = _walked(trie.tree, goto, start)
    if drops_leading_space and trie.space is not None:
        other = ~trie.begins_with_space[token]
        _, more, then = _walked(trie.tree, goto, start, trie.space)
        token, after = np.concatenate((token[other], more)), np.concatenate((after[other], then))
        alone = int(trie.tree.token[trie.space])
        if alone >= 0:
            token, after = np.append(token, alone), np.append(after, 0)
    if only is not None and (token == only).any():
        token, after = token[token == only], after[token == only]
    return np.full(len(token), len(goto)), token, after


def _used(table: npt.NDArray[np.int32], token_class: Ints) -> tuple[npt.NDArray[np.int32], Ints]:
    """Without classes that no token is of."""
    used = np.bincount(token_class, minlength=table.shape[1]) > 0
    if used.all():
        return table, token_class
    return table[:, used], (np.cumsum(used) - 1)[token_class]


def _mixed(left: npt.NDArray[np.integer], right: npt.NDArray[np.integer], salt: int) -> Words:
    """A random word for each pair (splitmix64's finisher, https://prng.di.unimi.it/splitmix64.c)."""
    word = (left.astype(np.uint64) << np.uint64(32)) ^ right.astype(np.uint64) ^ (np.uint64(salt + 1) << np.uint64(60))
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
