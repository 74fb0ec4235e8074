"""An automaton over bytes as one over a vocabulary's tokens, where tokens that no state tells apart form a class.

Most tokens are plain text, and most states that they may follow are the inside of a JSON string. There a token of n characters
leads n characters on, so that these tokens are looked at once, by their number of characters, not once for each state. All
others walk through the automaton byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from batchmix.structured_output.pattern import TooLarge
from batchmix.structured_output.trie import Ints, TokenTrie

Words = npt.NDArray[np.uint64]
_BLOCK_STATES = 256  # walked together
_MAX_ENTRIES = 4_000_000  # states by tokens: half a second
_PLAIN = [byte for byte in range(0x20, 0x80) if byte not in b'"\\']
_ESCAPED = list(b'"\\bfnrt')
# Bytes of UTF-8 by what follows them: (first bytes, second, third, fourth).
_TAIL = (0x80, 0xBF)
_SEQUENCES = [
    ((0xC2, 0xDF), _TAIL), ((0xE0, 0xE0), (0xA0, 0xBF), _TAIL), ((0xE1, 0xEC), _TAIL, _TAIL),
    ((0xED, 0xED), (0x80, 0x9F), _TAIL), ((0xEE, 0xEF), _TAIL, _TAIL), ((0xF0, 0xF0), (0x90, 0xBF), _TAIL, _TAIL),
    ((0xF1, 0xF3), _TAIL, _TAIL, _TAIL), ((0xF4, 0xF4), (0x80, 0x8F), _TAIL, _TAIL),
]  # fmt: skip


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
    step = character_steps(goto)
    step[[0, *only]] = -1  # these are looked at token by token
    inside = np.flatnonzero(step >= 0)
    others = np.flatnonzero(step < 0)
    parts: list[Triples] = []
    for low in range(0, len(others), _BLOCK_STATES):
        parts.append(_kept(_walked(trie, goto, others[low : low + _BLOCK_STATES]), only, num_states))
        if sum(len(part[0]) for part in parts) > _MAX_ENTRIES:
            raise TooLarge("the token tables take too long; shorten patterns, counted repetitions or choices")
    parts.append(_start(trie, goto, drops_leading_space, only_first))
    reached = _reached(step, inside, int(trie.string_tokens.characters.max(initial=0)))  # [characters, inside]
    parts += _irregular(trie, goto, inside, reached)
    origin, token, after = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    characters = trie.string_tokens.characters
    alike = _alike(reached)[np.minimum(characters, len(reached))]
    for salt in range(8):  # classes by sums of random words; another word if two that differ have one sum
        sums = np.zeros(trie.num_tokens, np.uint64)
        np.add.at(sums, token, _mixed(origin, after, salt))
        for count in range(1, len(reached)):
            there = reached[count] >= 0
            sums[characters == count] += _mixed(inside[there], reached[count][there], salt).sum(dtype=np.uint64)
        _, first, token_class = np.unique(sums, return_index=True, return_inverse=True)
        token_class = token_class.reshape(-1).astype(np.int64)
        table = np.full((num_states + 1, len(first)), -1, np.int32)
        for_class = first[token_class[token]] == token
        table[origin[for_class], token_class[token[for_class]]] = after[for_class]
        for place, count in enumerate(characters[first].tolist()):
            if 0 < count < len(reached):
                table[inside, place] = reached[count]
        sizes = np.bincount(token, minlength=trie.num_tokens) + (reached >= 0).sum(1)[alike] * (alike > 0)
        if (table[origin, token_class[token]] == after).all() and (sizes == sizes[first[token_class]]).all():
            pairs = np.unique(alike[alike > 0] << 32 | token_class[alike > 0])
            held = table[inside][:, pairs & (2**32 - 1)].T
            if ((held == reached[pairs >> 32]) | (reached[pairs >> 32] < 0)).all():
                return table, token_class
    raise AssertionError("tokens that differ have one sum, eight times")


Triples = tuple[Ints, Ints, Ints]  # states, tokens, states after them


def _walked(trie: TokenTrie, goto: npt.NDArray[np.int32], states: Ints, node: int = 0) -> Triples:
    parts = list(trie.walk(goto, states, node)) or [(_NONE, _NONE, _NONE)]
    origin, token, after = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return states[origin], token, after


_NONE = np.zeros(0, np.int64)


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
    _, token, after = _walked(trie, goto, np.zeros(1, np.int64))
    space = trie.child(ord(" ")) if drops_leading_space else None
    if space is not None:
        everything = np.zeros((1, 256), np.int32)
        spaced = np.zeros(trie.num_tokens, np.bool_)
        spaced[_walked(trie, everything, np.zeros(1, np.int64), space)[1]] = True
        alone = int(trie.token[space])
        if alone >= 0:
            spaced[alone] = True
        token, after = token[~spaced[token]], after[~spaced[token]]
        _, more, then = _walked(trie, goto, np.zeros(1, np.int64), space)
        token, after = np.concatenate((token, more)), np.concatenate((after, then))
        if alone >= 0:
            token, after = np.append(token, alone), np.append(after, 0)
    if only is not None and (token == only).any():
        token, after = token[token == only], after[token == only]
    return np.full(len(token), len(goto)), token, after


def character_steps(goto: npt.NDArray[np.int32]) -> Ints:
    """Of each state the one that every character of a JSON string leads to, as it or its escape is written; -1: none."""
    following = goto[:, ord("a")].astype(np.int64)
    states = np.flatnonzero(following >= 0)
    wanted = following[states]

    def narrow(good: npt.NDArray[np.bool_]) -> None:
        nonlocal states, wanted
        states, wanted = states[good], wanted[good]

    narrow((goto[states][:, _PLAIN] == wanted[:, None]).all(1))
    escape = goto[states, ord("\\")]
    narrow((escape >= 0) & (goto[escape][:, _ESCAPED] == wanted[:, None]).all(1))
    for sequence in _SEQUENCES:
        places = states
        for low, high in sequence:
            after = goto[places, low]
            narrow_by = (after >= 0) & (goto[places][:, low : high + 1] == after[:, None]).all(1)
            narrow(narrow_by)
            places = after[narrow_by]
        narrow(places == wanted)
    found = np.full(len(goto), -1, np.int64)
    found[states] = wanted
    return found


def _reached(step: Ints, inside: Ints, most: int) -> Ints:
    """The states that 0, 1, ... characters lead to from `inside`, -1: none. [characters, len(inside)]."""
    rows = [inside]
    while len(rows) <= most and len(inside):
        rows.append(np.where(rows[-1] >= 0, step[rows[-1]], -1))
        if (rows[-1] < 0).all():
            break
    return np.stack(rows)


def _alike(reached: Ints) -> Ints:
    """Of each count of characters, and of those beyond, the first that leads all states to the same; 0: nowhere."""
    found = np.zeros(len(reached) + 1, np.int64)
    known: dict[bytes, int] = {}
    for count in range(1, len(reached)):
        if (reached[count] >= 0).any():
            found[count] = known.setdefault(reached[count].tobytes(), count)
    return found


def _irregular(trie: TokenTrie, goto: npt.NDArray[np.int32], inside: Ints, reached: Ints) -> list[Triples]:
    """Tokens that are not only characters of a string: what comes after those walks byte by byte."""
    known, found = trie.string_tokens, []
    for count in range(len(reached)):
        tokens = known.irregular[known.before[known.irregular] == count]
        if not len(tokens) or not len(inside):
            continue
        here = np.flatnonzero(reached[count] >= 0)
        origin, place = np.repeat(inside[here], len(tokens)), np.repeat(reached[count][here], len(tokens))
        token = np.tile(tokens, len(here))
        at = 0
        rest, length = known.rest, known.length
        while len(token):
            over = length[token] == at
            if over.any():
                found.append((origin[over], token[over], place[over]))
                origin, token, place = origin[~over], token[~over], place[~over]
            if not len(token):
                break
            place = goto[place, rest[token, at]].astype(np.int64)
            alive = place >= 0
            origin, token, place = origin[alive], token[alive], place[alive]
            at += 1
    return found


def _mixed(left: Ints, right: Ints, salt: int) -> Words:
    """A random word for each pair (splitmix64's finisher, https://prng.di.unimi.it/splitmix64.c)."""
    word = (left.astype(np.uint64) << np.uint64(32)) ^ right.astype(np.uint64) ^ (np.uint64(salt + 1) << np.uint64(60))
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
