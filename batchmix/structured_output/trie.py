"""The texts of a vocabulary as a tree of bytes, so that an automaton runs over all tokens at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


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
