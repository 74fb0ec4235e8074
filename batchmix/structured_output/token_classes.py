"""An automaton over bytes as one over a vocabulary's tokens, where tokens that no state tells apart form a class.

Most states allow few tokens, which walk through the automaton byte by byte. The others are the inside of strings. There many
bytes are alike, as all letters are in a string without a pattern, so that tokens of like bytes walk as one. Only those with a
quotation mark or a backslash, which lead out of the string, are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from batchmix.structured_output.pattern import TooLarge
from batchmix.structured_output.trie import Ints, TokenTrie, Tree

Words = npt.NDArray[np.uint64]
_BLOCK_STATES = 1024  # walked together
_MAX_ENTRIES = 4_000_000  # states by tokens: half a second
_MANY_BYTES = 48  # of a state: the letters, or the letters and the digits without capitals, are fewer
_APART = b'"\\'
_SALTS = range(8)  # other random words if two that differ have one sum


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
    many = (goto >= 0).sum(1) >= _MANY_BYTES
    many[list(only)] = False
    inside, others = np.flatnonzero(many), np.flatnonzero(~many)
    by_group, group = _grouped(goto, trie, inside)  # [inside, groups + 1], [V]
    parts: list[Triples] = [_start(trie, goto, drops_leading_space, only_first)]
    for low in range(0, len(others), _BLOCK_STATES):
        parts.append(_kept(_walked(trie.tree, goto, others[low : low + _BLOCK_STATES]), only, num_states))
        _check(sum(len(part[0]) for part in parts))
    if len(inside):
        parts.append(_walked(trie.having(_APART), goto, inside))
    origin, token, after = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    # Tokens that these triples name; the others do as their group does.
    named = np.zeros(trie.num_tokens, np.bool_)
    named[token] = True
    tokens = np.flatnonzero(named)
    place = np.zeros(trie.num_tokens, np.int64)
    place[tokens] = np.arange(len(tokens))
    groups = by_group.shape[1]
    group_of = np.concatenate((np.arange(groups), group[tokens]))
    sizes = (by_group >= 0).sum(0)[group_of] + np.bincount(groups + place[token], minlength=len(group_of))
    for salt in _SALTS:  # classes by sums of random words
        sums = np.where(by_group >= 0, _mixed(inside[:, None], by_group, salt), np.uint64(0)).sum(0, dtype=np.uint64)[group_of]
        np.add.at(sums, groups + place[token], _mixed(origin, after, salt))
        _, first, classes = np.unique(sums, return_index=True, return_inverse=True)
        token_class = classes[group]
        token_class[tokens] = classes[groups:]
        table = np.full((num_states + 1, len(first)), -1, np.int32)
        table[inside] = by_group[:, group_of[first]]
        for_class = first[token_class[token]] == groups + place[token]
        table[origin[for_class], token_class[token[for_class]]] = after[for_class]
        if (sizes == sizes[first[classes]]).all() and (table[origin, token_class[token]] == after).all():
            pairs = np.unique(group_of << 32 | classes)
            there = by_group[:, pairs >> 32]
            if ((table[inside][:, pairs & (2**32 - 1)] == there) | (there < 0)).all():
                return _used(table, token_class)
    raise AssertionError("tokens that differ have one sum, each time")


Triples = tuple[Ints, Ints, Ints]  # states, tokens, states after them


def _check(entries: int) -> None:
    if entries > _MAX_ENTRIES:
        raise TooLarge("the token tables take too long; shorten patterns, counted repetitions or choices")


def _grouped(goto: npt.NDArray[np.int32], trie: TokenTrie, inside: Ints) -> tuple[npt.NDArray[np.int32], Ints]:
    """The state after each group of tokens whose bytes the states `inside` and those behind them do not tell apart.

    [inside, groups + 1], -1: none, and the group of each token, [V]. The last group is of tokens that have a byte of `_APART`.
    """
    if not len(inside):
        return np.full((0, 1), -1, np.int32), np.zeros(trie.num_tokens, np.int64)
    plain = np.ones(256, np.bool_)
    plain[list(_APART)] = False
    reached = np.zeros(len(goto), np.bool_)
    frontier = inside
    while len(frontier):
        reached[frontier] = True
        after = np.zeros(len(goto) + 1, np.bool_)
        after[goto[frontier][:, plain]] = True  # the last is -1, for none
        frontier = np.flatnonzero(after[:-1] & ~reached)
    rows = goto[reached]
    for salt in _SALTS:
        words = np.random.default_rng(salt).integers(1, 2**63, len(rows), np.uint64)
        sums = (rows.astype(np.uint64) * words[:, None]).sum(0, dtype=np.uint64)
        _, first, found = np.unique(sums[plain], return_index=True, return_inverse=True)
        order = np.argsort(first)  # numbered by their first bytes, so that like automata have like classes
        byte_class = np.full(256, -1, np.int64)
        byte_class[plain] = found = np.argsort(order)[found]
        first = np.flatnonzero(plain)[first[order]]
        if (rows[:, plain] == rows[:, first[found]]).all():
            break
    else:
        raise AssertionError("bytes that differ have one sum, each time")
    tree, group = trie.grouped(byte_class)
    groups = int(group.max(initial=-1)) + 1
    _check(len(inside) * groups // 4)
    origin, token, after_group = tree.walk(goto[:, first], inside)
    by_group = np.full((len(inside), groups + 1), -1, np.int32)
    by_group[origin, token] = after_group
    return by_group, np.where(group < 0, groups, group)


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
