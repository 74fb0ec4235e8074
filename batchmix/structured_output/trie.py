"""The texts of a vocabulary as a tree of bytes, so that an automaton runs over all tokens at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


# Characters as they stand in a JSON string: plain, escaped, or of several bytes of UTF-8.
_CHARACTERS = re.compile(
    rb'(?:[ !#-\[\]-\x7f]|\\["\\bfnrt]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]'
    rb"|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}"
    rb"|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})"
)


@dataclass(frozen=True)
class StringTokens:
    """A vocabulary's tokens as the inside of a JSON string reads them."""

    characters: Ints  # [V]: of a token that is characters of a string alone, else 0
    irregular: Ints  # the other tokens
    before: Ints  # [V]: of those, the characters that they begin with
    rest: npt.NDArray[np.uint8]  # [V, longest]: the bytes after them
    length: Ints  # [V]: how many


def string_tokens(texts: dict[int, bytes], num_tokens: int) -> StringTokens:
    """`texts` by token, of the tokens that texts are made of."""
    characters, before, length = (np.zeros(num_tokens, np.int64) for _ in range(3))
    rests: dict[int, bytes] = {}
    for token, text in texts.items():
        count = at = 0
        while match := _CHARACTERS.match(text, at):
            count, at = count + 1, match.end()
        if at == len(text):
            characters[token] = count
        else:
            before[token], rests[token], length[token] = count, text[at:], len(text) - at
    rest = np.zeros((num_tokens, max(map(len, rests.values()), default=0)), np.uint8)
    for token, data in rests.items():
        rest[token, : len(data)] = np.frombuffer(data, np.uint8)
    return StringTokens(characters, np.array(sorted(rests), np.int64), before, rest, length)


class TokenTrie:
    """Nodes in order of depth: node 0 is the empty text, and a node's children are neighbours.

    Tokens without text are in no node. Of tokens with the same text the last one counts: a SentencePiece vocabulary has
    its single bytes first, and its encoder uses them only for what no later piece can say.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.num_tokens = len(pieces)
        tree: list[dict[int, int]] = [{}]
        token_at: dict[int, int] = {}
        for token, piece in enumerate(pieces):
            node = 0
            for byte in piece:
                if byte not in tree[node]:
                    tree[node][byte] = len(tree)
                    tree.append({})
                node = tree[node][byte]
            if piece:
                token_at[node] = token
        self.string_tokens = string_tokens({token: pieces[token] for token in token_at.values()}, self.num_tokens)
        order = [0]  # of the nodes, by depth
        self.first_child = np.zeros(len(tree), np.int64)
        self.num_children = np.zeros(len(tree), np.int64)
        self.byte = np.zeros(len(tree), np.int64)
        for new, old in enumerate(order):  # grows while it is read
            self.first_child[new] = len(order)
            self.num_children[new] = len(tree[old])
            for byte, child in sorted(tree[old].items()):
                self.byte[len(order)] = byte
                order.append(child)
        self.token = np.array([token_at.get(old, -1) for old in order])

    def goes_on(self, text: bytes) -> bool:
        """Whether a token begins with this text and is longer."""
        node = 0
        for byte in text:
            child = self.child(byte, node)
            if child is None:
                return False
            node = child
        return bool(self.num_children[node])

    def child(self, byte: int, node: int = 0) -> int | None:
        """The node of one more byte."""
        first = int(self.first_child[node])
        children = self.byte[first : first + int(self.num_children[node])]
        place = int(np.searchsorted(children, byte))
        return first + place if place < len(children) and children[place] == byte else None

    def walk(self, goto: npt.NDArray[np.int32], states: Ints, node: int = 0) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Run each state over the texts below `node`: (which of `states`, token, state after it), in several parts.

        `goto` [num_states, 256], -1 where a text cannot go on.
        """
        origin, nodes = np.arange(len(states)), np.full(len(states), node)
        while len(nodes):
            count = self.num_children[nodes]
            parent = np.repeat(np.arange(len(nodes)), count)
            first = self.first_child[nodes] - (np.cumsum(count) - count)
            child = np.repeat(first, count) + np.arange(len(parent))
            after = goto[states[parent], self.byte[child]].astype(np.int64)
            alive = after >= 0
            origin, nodes, states = origin[parent][alive], child[alive], after[alive]
            whole = self.token[nodes] >= 0
            yield origin[whole], self.token[nodes][whole], states[whole]
