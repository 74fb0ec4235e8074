"""Where the text is forced, its tokens are those that the tokenizer itself gives that text.

A vocabulary can say one text in many ways, `"topic"` also as `"`, `t`, `op`, `ic"`; a model has seen one of them. Where an
automaton leaves the next bytes no choice, the other ways only spoil the answer and take steps, so a state then allows the
tokenizer's token alone. Not near the end of such a stretch, where what follows may be part of the last token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from batchmix.structured_output.automata import ByteAutomaton
from batchmix.structured_output.trie import TokenTrie

Encode: TypeAlias = Callable[[Sequence[str]], list[list[int]]]
_LONGEST = 64  # bytes of a stretch that are looked at
_BREAK = "\n"  # before a stretch that is not the text's start: tokens do not reach across it


def canonical_tokens(
    automaton: ByteAutomaton, trie: TokenTrie, pieces: Sequence[bytes], encode: Encode, drops_leading_space: bool
) -> tuple[dict[int, int], int | None]:
    """The one token that each state of a forced stretch is to allow, and that of the text's start, if it is in one.

    `pieces` are the bytes of each token, `encode` the tokenizer's way from a whole text to tokens.
    """
    stretches = {state: text for state, text in _stretches(automaton).items() if not trie.goes_on(text.encode())}
    texts = sorted(set(stretches.values()))
    found: dict[str, int | None] = {}
    *encoded, first = encode([*(_BREAK + text for text in texts), stretches.get(0, _BREAK)])
    for text, ids in zip(texts, encoded, strict=True):
        found[text] = _first_token(text, _behind_break(ids, pieces, drops_leading_space), trie, pieces)
    tokens = {state: token for state, text in stretches.items() if (token := found[text]) is not None}
    start = None
    if 0 in stretches:
        ids = first
        if ids and drops_leading_space and pieces[ids[0]].startswith(b" "):
            # One space at the start is not part of the text.
            start = ids[0] if _is_safe(stretches[0], len(pieces[ids[0]]) - 1, trie) else None
        else:
            start = _first_token(stretches[0], ids, trie, pieces)
    return tokens, start


def canonical_within(text: str, pieces: Sequence[bytes], encode: Encode, drops_leading_space: bool) -> Sequence[int]:
    """The tokenizer's tokens of a text that stands within an answer; none where it has no such tokens."""
    return _behind_break(encode([_BREAK + text])[0], pieces, drops_leading_space)


def _stretches(automaton: ByteAutomaton) -> dict[int, str]:
    """The text that must follow each state, where there is one; it begins and ends with whole characters."""
    possible = automaton.goto >= 0
    single = (possible.sum(1) == 1) & ~automaton.accepts
    states = np.flatnonzero(single)
    byte = possible[states].argmax(1)
    following = automaton.goto[states, byte]
    before: dict[int, list[tuple[int, int]]] = {}  # by state: single ones that lead to it, with their bytes
    for state, one, after in zip(states.tolist(), byte.tolist(), following.tolist(), strict=True):
        before.setdefault(after, []).append((state, one))
    found = {}
    todo = [(state, b"") for state in before if not single[state]]
    while todo:
        after, rest = todo.pop()
        for state, one in before.get(after, ()):
            data = bytes([one]) + rest[: _LONGEST - 1]
            todo.append((state, data))
            text = data.decode(errors="ignore")
            if text and data.startswith(text.encode()):
                found[state] = text
    return found


def _behind_break(ids: Sequence[int], pieces: Sequence[bytes], drops_leading_space: bool) -> Sequence[int]:
    """The tokens after those of `_BREAK`; none where a token reaches across it."""
    before = {_BREAK.encode(), b" " + _BREAK.encode()} if drops_leading_space else {_BREAK.encode()}
    data = b""
    for count, token in enumerate(ids, 1):
        data += pieces[token]
        if data in before:
            return ids[count:]
    return []


def _first_token(text: str, ids: Sequence[int], trie: TokenTrie, pieces: Sequence[bytes]) -> int | None:
    """The first of a stretch's tokens, if it does not depend on what follows the stretch."""
    if not ids or not text.encode().startswith(pieces[ids[0]]) or not pieces[ids[0]]:
        return None
    return ids[0] if _is_safe(text, len(pieces[ids[0]]), trie) else None


def _is_safe(text: str, end: int, trie: TokenTrie) -> bool:
    """Whether no token that reaches beyond the text begins before byte `end`."""
    data = text.encode()
    return end < len(data) and not any(trie.goes_on(data[place:]) for place in range(end))
