"""What a row's text may be, as tables over tokens that a decode step reads on the device.

A grammar is a deterministic automaton over tokens. Tokens that no state tells apart form a class, so that the table is
states by classes, not states by vocabulary: a JSON Schema of 300 states has about 300 classes for 32,000 tokens.

Each entry also says how many tokens the text needs after this one, at least. A step allows the tokens whose need fits
into what is left of max_tokens; so a text is always led to a valid end in time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batchmix.structured_output.automata import NEVER_ENDS, ByteAutomaton, steps_to_end
from batchmix.structured_output.pattern import TooLarge, Unsupported
from batchmix.structured_output.token_classes import token_classes
from batchmix.structured_output.trie import TokenTrie

_MAX_TABLE_BYTES = 64 * 2**20
_CACHED_SETS = 2048  # of allowed tokens, a byte for each token of the vocabulary
_LONGEST_RUN = 256  # forced tokens appended at once
_FEW = 2048  # tokens of a set that is kept as ids too


@dataclass(frozen=True)
class TokenSet:
    """Some tokens of a vocabulary, in the form that is cheapest to use where there are many rows."""

    allowed: npt.NDArray[np.bool_]  # [V]
    few_allowed: npt.NDArray[np.int64] | None  # ids of those allowed, where they are few
    few_forbidden: npt.NDArray[np.int64] | None  # ids of the others, where those are few


def token_set(allowed: npt.NDArray[np.bool_]) -> TokenSet:
    """The tokens of allowed [V]."""
    count = int(allowed.sum())
    few, many = count <= _FEW, len(allowed) - count <= _FEW
    return TokenSet(
        allowed,
        np.flatnonzero(allowed) if few else None,
        np.flatnonzero(~allowed) if many and not few else None,
    )


@dataclass
class CompiledGrammar:
    """An automaton over tokens. A state is the number of its first row in `table`.

    Row `state` holds (is no longer text possible, fewest tokens of a longer text) if the text may end here, else zeros.
    Row `state + token_class[token]` holds (next state, fewest tokens after that one, NEVER_ENDS: not allowed).
    """

    table: npt.NDArray[np.int32]  # [num_states * (1 + classes), 2]
    token_class: npt.NDArray[np.int32]  # [V], from 1 on
    start: int
    shortest: int  # tokens of the shortest text
    shortest_longer: int  # of the shortest text that is not empty
    has_end: bool  # whether a token can end a text that could go on
    forced: dict[int, int]  # by state: the only token that may come next, where there is just one
    kind = "table"  # of `rows_guided` in the summary
    _runs: dict[int, list[int]] = field(default_factory=dict, repr=False)
    _sets: dict[tuple[int, int], TokenSet] = field(default_factory=dict, repr=False)
    _most: dict[int, int] = field(default_factory=dict, repr=False)  # by state: the largest need of a token

    def tokens_needed(self, min_tokens: int) -> int:
        """The fewest tokens of a row's text."""
        return self.shortest if self.has_end and not min_tokens else self.shortest_longer

    def next_state(self, state: int, token: int) -> int:
        """The state after a token that is allowed."""
        return int(self.table[state + self.token_class[token], 0])

    def after(self, state: int, tokens: Iterable[int]) -> int:
        """The state after tokens that are allowed one after the other."""
        for token in tokens:
            state = self.next_state(state, token)
        return state

    def jump_forward_tokens(self, state: int) -> list[int]:
        """The tokens that must come next, up to a choice or to the last one before the text may end."""
        run = self._runs.get(state)
        if run is None:
            run, place = [], state
            while place in self.forced and len(run) < _LONGEST_RUN:
                following = self.next_state(place, self.forced[place])
                if self.may_end(following):
                    break
                run.append(self.forced[place])
                place = following
            self._runs[state] = run
        return run

    def is_allowed(self, state: int, token: int, left: int) -> bool:
        """Whether the token may come next with `left` more tokens to come after it."""
        return bool(self.table[state + self.token_class[token], 1] <= left)

    def may_end(self, state: int) -> bool:
        """Whether the text is whole."""
        return bool(self.table[state, 1] > 0)

    def is_over(self, state: int) -> bool:
        """Whether the text is whole and no longer one is allowed."""
        return bool(self.table[state, 0])

    def allowed_tokens(self, state: int, left: int) -> TokenSet:
        """The tokens that `is_allowed`."""
        most = self._most.get(state)
        if most is None:
            need = self._need(state)
            most = self._most[state] = int(need[need < NEVER_ENDS].max(initial=0))
        left = min(left, most)  # with as much left or more all is alike
        found = self._sets.get((state, left))
        if found is None:
            if len(self._sets) >= _CACHED_SETS:
                self._sets.clear()
            found = self._sets[state, left] = token_set((self._need(state) <= left)[self.token_class - 1])
        return found

    def _need(self, state: int) -> npt.NDArray[np.int32]:
        """Of each class of tokens, [C]."""
        return self.table[state + 1 : state + 1 + int(self.token_class.max()), 1]


def compile_grammar(
    automaton: ByteAutomaton,
    trie: TokenTrie,
    *,
    end_tokens: Iterable[int],
    drops_leading_space: bool,
    only: Mapping[int, int] | None = None,
    only_first: int | None = None,
) -> CompiledGrammar:
    """The automaton of texts over the tokens of a vocabulary.

    `end_tokens` end a text where it may end and are nothing else; they must have no text in `trie`. With
    `drops_leading_space` one space at the start of the first token is not part of the text. A state that `only` has, and the
    text's start if `only_first` is given, allows that token alone (canonical.py). Unsupported where the
    vocabulary cannot say any of the texts, or where the tables would be too large.
    """
    following, token_class = token_classes(
        automaton.goto, trie, drops_leading_space, only or {}, only_first
    )  # [S, C], [V]
    accepts = np.append(automaton.accepts, automaton.accepts[0])
    end_tokens = list(end_tokens)
    distance = steps_to_end(following, accepts)
    start = len(accepts) - 1
    if distance[start] >= NEVER_ENDS:
        raise Unsupported("the model's vocabulary has no tokens for any text that fits")
    num_states, num_classes = following.shape
    width = 1 + num_classes + bool(end_tokens)
    if num_states * width * 8 > _MAX_TABLE_BYTES:
        raise TooLarge("the token tables are too large; shorten counted repetitions (maxLength, maxItems, {low,high})")
    table = np.zeros((num_states, width, 2), np.int32)
    tokens = table[:, 1 : 1 + num_classes]
    np.multiply(np.maximum(following, 0), width, out=tokens[:, :, 0])
    need = np.append(distance, NEVER_ENDS).astype(np.int32)[following]  # the last is of no state
    tokens[:, :, 1] = need
    longer = np.minimum(1 + need.min(1, initial=NEVER_ENDS), NEVER_ENDS)
    table[:, 0, 0] = accepts & (longer >= NEVER_ENDS)
    table[:, 0, 1] = np.where(accepts, longer, 0)
    sizes = np.bincount(token_class, minlength=num_classes)
    if end_tokens:  # a class of their own
        token_class[end_tokens] = num_classes
        table[:, -1, 0] = np.where(accepts, np.arange(num_states) * width, 0)
        table[:, -1, 1] = np.where(accepts, 0, NEVER_ENDS)

    possible = need < NEVER_ENDS
    alone = np.flatnonzero(
        (possible.astype(np.float32) @ sizes.astype(np.float32) == 1) & ~(accepts & bool(end_tokens))
    )
    token_of = np.zeros(width, np.int64)  # one of each class
    token_of[token_class] = np.arange(len(token_class))
    forced = dict(zip((alone * width).tolist(), token_of[possible[alone].argmax(1)].tolist(), strict=True))
    return CompiledGrammar(
        table.reshape(-1, 2), (token_class + 1).astype(np.int32), start * width, int(distance[start]),
        int(longer[start]), bool(end_tokens), forced,
    )  # fmt: skip
