"""The texts of a vocabulary as a tree of bytes, so that an automaton runs over all tokens at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
_KEPT = 16  # trees of groups, two megabytes each at most


@dataclass(frozen=True)
class Tree:
    """Nodes in order of depth: node 0 is the empty text, and a node's children are neighbours."""

    first_child: Ints  # by node, as the others
    num_children: Ints
    symbol: Ints  # the last of its text: a byte, or a class of bytes
    token: Ints  # whose text it is, -1: none

    def walk(self, goto: npt.NDArray[np.int32], states: Ints, node: int = 0) -> tuple[Ints, Ints, Ints]:
        """Run each state over the texts below `node`: (which of `states`, token, state after it), of all that go on.

        `goto` [num_states, symbols], -1 where a text cannot go on.
        """
        children = np.arange(self.first_child[node], self.first_child[node] + self.num_children[node])
        child_of = np.full(goto.shape[1], -1, np.int64)
        child_of[self.symbol[children]] = children
        origin, symbol = np.nonzero((goto[states] >= 0) & (child_of >= 0))
        nodes, states = child_of[symbol], goto[states[origin], symbol].astype(np.int64)
        found = [(np.zeros(0, np.int64),) * 3]
        while len(nodes):
            whole = self.token[nodes] >= 0
            found.append((origin[whole], self.token[nodes[whole]], states[whole]))
            count = self.num_children[nodes]
            parent = np.repeat(np.arange(len(nodes)), count)
            child = np.repeat(self.first_child[nodes] - (np.cumsum(count) - count), count) + np.arange(len(parent))
            after = goto[states[parent], self.symbol[child]]
            alive = np.flatnonzero(after >= 0)
            origin, nodes, states = origin[parent[alive]], child[alive], after[alive].astype(np.int64)
        origin, token, states = (np.concatenate(columns) for columns in zip(*found, strict=True))
        return origin, token, states


class TokenTrie:
    """The tokens of a vocabulary that texts are made of.

    Of tokens with the same text the last one counts: a SentencePiece vocabulary has its single bytes first, and its encoder
    uses them only for what no later piece can say.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        """`pieces` by token, b"" for those that no text has."""
        self.num_tokens = len(pieces)
        nodes: list[dict[int, int]] = [{}]
        token_at: dict[int, int] = {}
        for token, piece in enumerate(pieces):
            node = 0
            for byte in piece:
                if byte not in nodes[node]:
                    nodes[node][byte] = len(nodes)
                    nodes.append({})
                node = nodes[node][byte]
            if piece:
                token_at[node] = token
        self._texts = {token: pieces[token] for token in token_at.values()}
        self._beginnings = {text[:end] for text in self._texts.values() for end in range(len(text))}
        order, first_child, symbol = [0], [], [0]  # by depth
        for old in order:  # grows while it is read
            first_child.append(len(order))
            for byte, child in sorted(nodes[old].items()):
                symbol.append(byte)
                order.append(child)
        num_children = np.array([len(nodes[old]) for old in order])
        tokens = np.array([token_at.get(old, -1) for old in order])
        self.tree = Tree(np.array(first_child), num_children, np.array(symbol), tokens)
        self._parent = np.append(0, np.repeat(np.arange(len(order)), num_children))
        self._grouped: dict[bytes, tuple[Tree, Ints]] = {}

    def goes_on(self, text: bytes) -> bool:
        """Whether a token begins with this text and is longer."""
        return text in self._beginnings

    @cached_property
    def space(self) -> int | None:
        """The node of a single space."""
        children = np.flatnonzero(self.tree.symbol[1 : 1 + self.tree.num_children[0]] == ord(" "))
        return int(children[0]) + 1 if len(children) else None

    @cached_property
    def tokens_from(self) -> Ints:
        """How many tokens begin with each byte, [256]."""
        return np.bincount(np.array([text[0] for text in self._texts.values()], np.int64), minlength=256)

    @cached_property
    def begins_with_space(self) -> npt.NDArray[np.bool_]:
        """Of each token, [V]."""
        found = np.zeros(self.num_tokens, np.bool_)
        found[[token for token, text in self._texts.items() if text.startswith(b" ")]] = True
        return found

    def having(self, some: bytes) -> Tree:
        """The tokens that have one of these bytes."""
        if some not in self._having:
            pieces = [b""] * self.num_tokens
            for token, text in self._texts.items():
                if any(byte in some for byte in text):
                    pieces[token] = text
            self._having[some] = TokenTrie(pieces).tree
        return self._having[some]

    @cached_property
    def _having(self) -> dict[bytes, Tree]:
        return {}

    def grouped(self, first_class: Ints, byte_class: Ints) -> tuple[Tree, Ints]:
        """Tokens whose bytes are of the same classes as one: their tree, and the group of each token, [V], -1: none.

        `first_class` [256] is of the first byte of a token, `byte_class` of the others, no class is in both; tokens with a
        byte of class -1 are in no group.
        """
        key = first_class.tobytes() + byte_class.tobytes()
        if key not in self._grouped:
            if len(self._grouped) >= _KEPT:
                self._grouped.clear()
            self._grouped[key] = self._group(first_class, byte_class)
        return self._grouped[key]

    def _group(self, first_class: Ints, byte_class: Ints) -> tuple[Tree, Ints]:
        classes = int(max(first_class.max(), byte_class.max())) + 1
        merged = np.full(len(self._parent), -1, np.int64)  # by node the one in its place
        merged[0] = 0
        parents, symbols, count = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], 1
        low, high = 1, 1 + int(self.tree.num_children[0])  # the nodes of a depth
        while low < high:
            above, own = (
                merged[self._parent[low:high]],
                (first_class if low == 1 else byte_class)[self.tree.symbol[low:high]],
            )
            kept = np.flatnonzero((above >= 0) & (own >= 0))
            different, number = np.unique(above[kept] * classes + own[kept], return_inverse=True)
            merged[low + kept] = count + number
            parents.append(different // classes)
            symbols.append(different % classes)
            count += len(different)
            low, high = high, high + int(self.tree.num_children[low:high].sum())
        num_children = np.bincount(np.concatenate(parents)[1:], minlength=count)
        nodes = np.flatnonzero((self.tree.token >= 0) & (merged >= 0))
        whole, number = np.unique(merged[nodes], return_inverse=True)
        group = np.full(self.num_tokens, -1, np.int64)
        group[self.tree.token[nodes]] = number
        token = np.full(count, -1, np.int64)
        token[whole] = np.arange(len(whole))
        return Tree(1 + np.cumsum(num_children) - num_children, num_children, np.concatenate(symbols), token), group
