"""Grammars for what no table can hold: a library follows each row's text on the host and says which tokens may come next.

Recursive schemas have no finite automaton, and some patterns have one that is too large. llguidance (an Earley parser over
a lexer that is made as it runs) gives a mask over the vocabulary for each row and step, tens of microseconds each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from batchmix.structured_output.grammar import TokenSet, token_set
from batchmix.structured_output.lark import lark
from batchmix.structured_output.pattern import NEVER, Grammar, NoText, Unsupported, without_dead_ends

if TYPE_CHECKING:
    from llguidance import LLMatcher

Bools: TypeAlias = npt.NDArray[np.bool_]
Packed: TypeAlias = npt.NDArray[np.uint8]  # a bit for each token of a vocabulary
Tokenize: TypeAlias = Callable[[str], Sequence[int]]
_CACHED_MASKS = 1024  # a byte for each token of the vocabulary, and some
_BYTES = {bytes([byte]) for byte in range(0xF5) if byte not in (0xC0, 0xC1)}  # of UTF-8


def pack(tokens: Bools) -> Packed:
    """bool [V] as bits, [V / 8]."""
    return np.packbits(tokens, bitorder="little")


@dataclass(frozen=True)
class Following:
    """What may come next in a text."""

    goes_on: bool  # whether a longer text is possible
    tokens: TokenSet  # those that end the text included
    packed: Packed  # the same, [V / 8]


class HostVocabulary:
    """A model's tokens as llguidance knows them. Unsupported where the library is not installed or could not say any text."""

    def __init__(
        self, pieces: Sequence[bytes], tokens: Bools, tokenize: Tokenize | None, drops_leading_space: bool
    ) -> None:
        """`pieces` [V], b"" for tokens without text; `tokens` [V]: those that texts are made of. `tokenize` gives a text within
        an answer as the tokenizer would, [] where it cannot: what is forced is said so."""
        try:
            import llguidance
        except ImportError:
            raise Unsupported("needs llguidance, which is not installed: pip install llguidance") from None
        if not _BYTES.issubset(pieces[token] for token in np.flatnonzero(tokens)):
            # The library would take the rest of a forced text for said, and allow what comes after it.
            raise Unsupported("needs a vocabulary with a token for each byte, and the model's has none for some")
        self.tokens = tokens
        self._packed = pack(tokens)
        self.begins_with_space = np.array([piece.startswith(b" ") for piece in pieces])
        everything = np.ones(len(pieces), np.bool_)
        self.anything = Following(True, token_set(everything), pack(everything))
        self._followings: dict[tuple[bytes, tuple[int, ...]], Following] = {}  # most texts are where others were
        self.drops_leading_space = drops_leading_space
        self._library = llguidance
        # The library's end token is one that no model has: which tokens end a text is the row's matter.
        names = [piece or b"\xff<%d>" % token for token, piece in enumerate([*pieces, b""])]
        tokens_of = llguidance.TokenizerWrapper(_Tokens(names, tokenize, self._greedy))
        self._tokenizer = llguidance.LLTokenizer(tokens_of, eos_token=len(pieces))
        self._executor = llguidance.LLExecutor()

    def matcher(self, text: str) -> LLMatcher:
        """At the start of the texts of a grammar in Lark's notation. Unsupported where the library refuses it."""
        text = self._library.LLMatcher.grammar_from_lark(text)
        try:
            found: LLMatcher = self._library.LLMatcher(self._tokenizer, text, log_level=0)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust; it is no Exception
                raise
            raise Unsupported(f"llguidance failed: {_line(str(error))}") from None
        if found.is_error():
            raise Unsupported(_line(found.get_error()))
        return found

    def masks(self, matchers: Sequence[LLMatcher]) -> Packed:
        """The tokens that each text may go on with, [N, V / 8]; in threads, without Python's lock."""
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

        bits = allocate_token_bitmask(len(matchers), len(self.tokens) + 1)
        fill_next_token_bitmask_par(self._executor, [(matcher, i) for i, matcher in enumerate(matchers)], bits)
        found: Packed = bits.view(np.uint8)[:, : len(self._packed)] & self._packed
        return found

    def following(self, mask: Packed, end_tokens: tuple[int, ...]) -> Following:
        """A text that may go on with the tokens of the mask [V / 8], or end with one of `end_tokens`."""
        key = mask.tobytes(), end_tokens
        found = self._followings.get(key)
        if found is None:
            if len(self._followings) >= _CACHED_MASKS:
                self._followings.clear()
            allowed = np.unpackbits(mask, count=len(self.tokens), bitorder="little").view(np.bool_)
            goes_on = bool(allowed.any())
            allowed[list(end_tokens)] = True
            found = self._followings[key] = Following(goes_on, token_set(allowed), pack(allowed))
        return found

    def _greedy(self, text: str) -> list[int]:
        return self._tokenizer.greedy_tokenize(text)


@dataclass(frozen=True)
class HostGrammar:
    """A grammar at the start of its texts, for one model and one way of ending them."""

    vocabulary: HostVocabulary
    matcher: LLMatcher
    after_space: LLMatcher | None  # of the grammar with a space in front of it, where the tokenizer puts one there
    first: Packed  # [V / 8]: tokens that a text may begin with
    end_tokens: tuple[int, ...]
    of_schema: bool  # of a JSON Schema that llguidance reads itself

    @property
    def kind(self) -> str:
        """Of `rows_guided` in the summary."""
        return "llguidance" if self.of_schema else "host"

    def tokens_needed(self, min_tokens: int) -> int:
        """Of a row's text at least. What it takes to end one is not known beforehand."""
        return 0 if self.matcher.is_accepting() and len(self.end_tokens) and not min_tokens else 1


class GrammarMatcher:
    """One row's text under a HostGrammar, as far as the host has read it back."""

    following: Following

    def __init__(self, grammar: HostGrammar) -> None:
        self.grammar = grammar
        self.count = 0  # tokens of the text
        self.matcher = grammar.matcher.deep_copy()
        self.allow(grammar.first)

    @property
    def may_end(self) -> bool:
        """Whether the text is whole."""
        return self.matcher.is_accepting()

    @property
    def error(self) -> str:
        """Why no token may come next, where the text is not whole."""
        return _line(self.matcher.get_error()) or "no token of the model's vocabulary can follow"

    def take(self, tokens: Sequence[int]) -> None:
        """More tokens of the text, allowed one after the other; `follow` then finds what may come next."""
        for token in tokens:
            spaced = self.grammar.after_space
            if self.count == 0 and spaced is not None and self.grammar.vocabulary.begins_with_space[token]:
                self.matcher = spaced.deep_copy()
            self.count += 1
            self.matcher.consume_token(token)

    def allow(self, mask: Packed) -> None:
        """`mask` [V / 8] are the tokens that a longer text may go on with."""
        self.following = self.grammar.vocabulary.following(mask, self.grammar.end_tokens if self.may_end else ())


def host_grammar(grammar: Grammar, vocabulary: HostVocabulary, end_tokens: Sequence[int]) -> HostGrammar:
    """The grammar of a grammar's texts. Unsupported where there are none, or where the library refuses it."""
    if grammar.schema is None:
        grammar = without_dead_ends(grammar)
        if grammar.pattern == NEVER:
            raise NoText
    own, behind_space = lark(grammar, "", " ")
    matcher = vocabulary.matcher(own)
    first = vocabulary.masks([matcher.deep_copy()])[0]
    spaced = None
    if vocabulary.drops_leading_space:
        # One space at the start is not part of the text: a token that begins with it says what follows the space.
        spaced = vocabulary.matcher(behind_space)
        with_space = vocabulary.masks([spaced.deep_copy()])[0]
        forced = np.bitwise_count(with_space).sum() == 1  # the way that the tokenizer itself begins
        first = with_space if forced else with_space | (first & ~pack(vocabulary.begins_with_space))
    return HostGrammar(vocabulary, matcher, spaced, first, tuple(end_tokens), grammar.schema is not None)


def follow(texts: Sequence[GrammarMatcher]) -> None:
    """Find what may follow each text, of one vocabulary."""
    if texts:
        masks = texts[0].grammar.vocabulary.masks([text.matcher for text in texts])
        for text, mask in zip(texts, masks, strict=True):
            text.allow(mask)


class _Tokens:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], tokenize: Tokenize | None, greedy: Tokenize) -> None:
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1
        self.special_token_ids = [token for token, piece in enumerate(tokens) if piece.startswith(b"\xff<")]
        self._tokenize, self._greedy = tokenize, greedy
        self._last = {piece: token for token, piece in enumerate(tokens)}  # of tokens with one text the last counts
        self._cached: Any = lru_cache(4096)(self._found)

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that is forced, joined to exactly that text."""
        found: list[int] = self._cached(text)
        return found

    def _found(self, text: str) -> list[int]:
        ids = list(self._tokenize(text)) if self._tokenize is not None else []
        if b"".join(self.tokens[token] for token in ids) != text.encode():
            ids = list(self._greedy(text))
        return [self._last[self.tokens[token]] for token in ids]


def _line(error: str) -> str:
    return " ".join(error.split())[:200]
