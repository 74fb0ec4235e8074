"""From `sampling.structured_outputs` to the grammar of a row, compiled once for all rows that ask for the same."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from batchmix.prompts.tokenizer import Tokenizer, vocabulary_bytes
from batchmix.prompts.vocabulary import join, strip_start
from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.structured_output.canonical import Encode, canonical_tokens, canonical_within
from batchmix.structured_output.delegated import delegated_schema
from batchmix.structured_output.dfa import build_automaton
from batchmix.structured_output.grammar import CompiledGrammar, compile_grammar
from batchmix.structured_output.grammar_cache import GrammarCache
from batchmix.structured_output.host_grammar import HostGrammar, HostVocabulary, host_grammar
from batchmix.structured_output.json_schema import json_schema_grammar
from batchmix.structured_output.keywords import unknown_line
from batchmix.structured_output.pattern import NEVER, BeyondUs, Grammar, Pattern, TooLarge, Unsupported, alt, literal
from batchmix.structured_output.regex import regex_pattern
from batchmix.structured_output.trie import TokenTrie
from batchmix.templates.messages import PromptError

T = TypeVar("T")
_log = logging.getLogger(__name__)
_DELEGATED = "too large for our compiler, so that llguidance reads the schema itself"
_RECURSIVE = "recursive (any value, or a schema within itself)"
_WORTH_KEEPING = 0.05  # seconds of compiling: reading a table takes less
_KEPT = 64  # grammars that are kept for rows to come
_MAX_CHARS = (
    2**18
)  # of choices, of a regex or of a schema: 30,000 short choices; what is longer takes seconds to compile


class GrammarCompiler:
    """The grammars of one model's vocabulary. Threads may share it.

    `pieces` [V] are the bytes of each token, b"" for control tokens, which are never part of a guided text.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        drops_leading_space: bool,
        eos_token_ids: Sequence[int],
        encode: Encode | None = None,
        cache: GrammarCache | None = None,
    ) -> None:
        """`encode`: texts as the tokens that would be generated for them; without it, choices cannot be
        scored, and a forced text may be said in any tokens. `cache` has tables of earlier runs."""
        self._cache = cache
        self._pieces = pieces
        self._drops_leading_space = drops_leading_space
        self._eos_token_ids = tuple(eos_token_ids)
        self._tries: dict[Hashable, TokenTrie] = {}
        self._compiled: OrderedDict[Hashable, CompiledGrammar | HostGrammar] = OrderedDict()
        self._host_vocabulary: HostVocabulary | None = None
        self._named_unknown = False  # whether a line of the log has named keywords that are read past
        self._encode = encode
        self._choice_tokens: OrderedDict[Hashable, list[list[int]]] = OrderedDict()
        self._lock = threading.Lock()  # of what is kept
        self._making = threading.Lock()  # held for as long as making takes: what is kept can be had meanwhile

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int], *, on_disk: bool = False
    ) -> GrammarCompiler:
        """Those of a tokenizer, for a model whose vocabulary may be larger or smaller. `on_disk`: tables are kept for
        other runs."""
        pieces = vocabulary_bytes(tokenizer, vocab_size)
        return cls(
            pieces,
            drops_leading_space=tokenizer.drops_leading_space,
            eos_token_ids=eos_token_ids,
            encode=partial(_encode_answers, tokenizer),
            cache=GrammarCache.of(pieces, tokenizer.drops_leading_space, tuple(eos_token_ids)) if on_disk else None,
        )

    def get(self, sampling: SamplingConfig) -> CompiledGrammar | HostGrammar:
        """The grammar of a row with structured_outputs. Unsupported, in one line that names the key, where there is none."""
        return self._kept(self._compiled, grammar_key(sampling), lambda: self._compile(sampling))

    def tokens_needed(self, sampling: SamplingConfig) -> int:
        """The tokens of the shortest text that a row's grammar allows, or of the longest choice that is scored.

        PromptError, in one line that names the key, where there is no such grammar.
        """
        assert sampling.structured_outputs is not None
        try:
            if sampling.structured_outputs.score_choices:
                return max(map(len, self.choice_tokens(sampling)))
            return self.get(sampling).tokens_needed(sampling.min_tokens)
        except Unsupported as error:
            raise PromptError(str(error)) from None

    def end_tokens(self, sampling: SamplingConfig) -> list[int]:
        """The tokens that end a guided text, ascending."""
        ends = set(sampling.stop_token_ids or ()) | set(() if sampling.ignore_eos else self._eos_token_ids)
        return sorted(ends if sampling.allowed_token_ids is None else ends & set(sampling.allowed_token_ids))

    def choice_tokens(self, sampling: SamplingConfig) -> list[list[int]]:
        """The tokens of each choice. Unsupported where the tokenizer cannot encode one so that its text comes back."""
        assert sampling.structured_outputs is not None
        texts = tuple(sampling.structured_outputs.choice or ())
        return self._kept(self._choice_tokens, texts, lambda: self._encode_choices(texts))

    def _encode_choices(self, texts: Sequence[str]) -> list[list[int]]:
        assert self._encode is not None
        found = self._encode(texts)
        for text, ids in zip(texts, found, strict=True):
            data = strip_start(join(ids, self._pieces), self._drops_leading_space)
            if data != text.encode() or not ids or max(ids) >= len(self._pieces):
                raise Unsupported(
                    f"sampling.structured_outputs.choice: the tokenizer cannot encode {text!r} so that it comes back"
                )
        return found

    def _kept(self, kept: OrderedDict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
        """What is kept under the key, or made now: one at a time, as many threads may ask for the same."""
        with self._lock:
            if key in kept:
                kept.move_to_end(key)
                return kept[key]
        with self._making:
            with self._lock:
                if key in kept:
                    return kept[key]
            made = make()
            with self._lock:
                if len(kept) >= _KEPT:
                    kept.popitem(last=False)
                kept[key] = made
            return made

    def _compile(self, sampling: SamplingConfig) -> CompiledGrammar | HostGrammar:
        assert sampling.structured_outputs is not None
        outputs = sampling.structured_outputs
        name = next(name for name in ("choice", "regex", "json") if getattr(outputs, name) is not None)
        key = grammar_key(sampling)
        kept = self._cache.get(key) if self._cache is not None else None
        if kept is not None:
            self._read_past(kept[1])
            return kept[0]
        unknown: dict[str, None] = {}
        started = time.perf_counter()
        try:
            grammar = _grammar(outputs, unknown)
            self._read_past(unknown)
            if grammar.schema is not None:
                return self._on_host(grammar, sampling, name, _DELEGATED)
            if grammar.rules:
                return self._on_host(grammar, sampling, name, _RECURSIVE)
            try:
                found = self._as_table(grammar.pattern, sampling)
                if self._cache is not None and time.perf_counter() - started > _WORTH_KEEPING:
                    self._cache.put(key, found, unknown)
                return found
            except TooLarge as error:
                return self._on_host(grammar, sampling, name, str(error))
        except Unsupported as error:
            raise Unsupported(f"sampling.structured_outputs.{name}: {error}") from None
        except RecursionError:
            raise Unsupported(f"sampling.structured_outputs.{name}: nested too deeply") from None

    def _read_past(self, unknown: Iterable[str]) -> None:
        """Name keywords that say nothing to us, in one line for all schemas of the run."""
        names = [name for name in unknown if not name.startswith("x-")]
        if names and not self._named_unknown:
            self._named_unknown = True
            _log.warning(
                "sampling.structured_outputs.json: keywords that JSON Schema does not have are read past, as validators do: %s",
                unknown_line(names[:8]),
            )

    def _as_table(self, pattern: Pattern, sampling: SamplingConfig) -> CompiledGrammar:
        ends = self.end_tokens(sampling)
        allowed = None if sampling.allowed_token_ids is None else set(sampling.allowed_token_ids)
        automaton = build_automaton(pattern)
        trie = self._trie({*ends, *(sampling.stop_token_ids or ())}, allowed)
        only: dict[int, int] = {}
        first = None
        if self._encode is not None and allowed is None:
            only, first = canonical_tokens(automaton, trie, self._pieces, self._encode, self._drops_leading_space)
        return compile_grammar(
            automaton,
            trie,
            end_tokens=ends,
            drops_leading_space=self._drops_leading_space,
            only=only,
            only_first=first,
        )

    def _on_host(self, grammar: Grammar, sampling: SamplingConfig, name: str, why: str) -> HostGrammar:
        """`name` is the key, `why` it has no table, for messages."""
        if sampling.allowed_token_ids is not None or any(self._pieces[id] for id in sampling.stop_token_ids or ()):
            raise Unsupported(f"{why}; allowed_token_ids, and stop_token_ids with a text, need a grammar with a table")
        if self._host_vocabulary is None:
            trie = self._trie(set(self._eos_token_ids), None)
            tokens = np.zeros(len(self._pieces), np.bool_)
            tokens[trie.tree.token[trie.tree.token >= 0]] = True
            try:
                self._host_vocabulary = HostVocabulary(self._pieces, tokens, self._tokenize, self._drops_leading_space)
            except Unsupported as error:
                raise Unsupported(f"{why}; without tables it {error}") from None
            _log.info(
                "sampling.structured_outputs.%s: %s. So it has no table; the host finds the tokens that may come next, at every"
                " step (docs/guided.md)", name, why,
            )  # fmt: skip
        return host_grammar(grammar, self._host_vocabulary, self.end_tokens(sampling))

    def _tokenize(self, text: str) -> Sequence[int]:
        if self._encode is None:
            return []
        return canonical_within(text, self._pieces, self._encode, self._drops_leading_space)

    def _trie(self, ends: set[int], allowed: set[int] | None) -> TokenTrie:
        """The tokens that a text may have: not those that end it, and of the rest those allowed."""
        key = frozenset(token for token in ends if self._pieces[token]), None if allowed is None else frozenset(allowed)
        if key not in self._tries:
            if len(self._tries) >= _KEPT:
                self._tries.clear()
            pieces = [
                b"" if token in ends or (allowed is not None and token not in allowed) else piece
                for token, piece in enumerate(self._pieces)
            ]
            self._tries[key] = TokenTrie(pieces)
        return self._tries[key]


def open_grammars(tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]) -> GrammarCompiler | None:
    """The grammars of a model's vocabulary; None without a tokenizer. Compiles nothing yet."""
    return None if tokenizer is None else GrammarCompiler.of(tokenizer, vocab_size, eos_token_ids, on_disk=True)


def grammar_key(sampling: SamplingConfig) -> tuple[Any, ...]:
    """What makes two rows share a grammar; empty where there is none."""
    outputs = sampling.structured_outputs
    if outputs is None:
        return ()
    schema = outputs.json if isinstance(outputs.json, str) else json.dumps(outputs.json)
    allowed = None if sampling.allowed_token_ids is None else tuple(sampling.allowed_token_ids)
    ends = tuple(sampling.stop_token_ids or ()), sampling.ignore_eos
    return tuple(outputs.choice or ()), outputs.regex, schema, allowed, ends


def _encode_answers(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Each text as an answer, without the tokens that the tokenizer puts around a whole text."""
    around = {tokenizer.bos_id, tokenizer.eos_id}
    found = []
    for ids in tokenizer.encode_texts(texts):
        answer = [] if isinstance(ids, PromptError) else list(ids)
        while answer and answer[0] in around:
            answer = answer[1:]
        while answer and answer[-1] in around:
            answer = answer[:-1]
        found.append(answer)
    return found


def _grammar(outputs: StructuredOutputs, unknown: dict[str, None]) -> Grammar:
    """The texts that are allowed; `unknown` collects keywords of a schema that are read past.

    Unsupported, before any work, where they are written in too long a text.
    """
    written = outputs.choice or (outputs.json if outputs.regex is None else outputs.regex)
    written = written if isinstance(written, str | list | tuple) else json.dumps(written)
    size = len(written) if isinstance(written, str) else sum(map(len, written))
    if size > _MAX_CHARS:
        raise Unsupported(f"has {size:,} characters; at most {_MAX_CHARS:,} are compiled for one row")
    if outputs.choice is not None:
        return Grammar(alt([literal(text) for text in outputs.choice]))
    if outputs.regex is not None:
        return Grammar(regex_pattern(outputs.regex))
    try:
        schema = json.loads(outputs.json) if isinstance(outputs.json, str) else outputs.json
    except ValueError as error:
        raise Unsupported(f"no JSON ({error}); give a mapping or JSON text, a file is not read") from None
    try:
        return json_schema_grammar(schema, unknown)
    except (BeyondUs, TooLarge) as error:
        try:
            return Grammar(NEVER, schema=delegated_schema(schema))
        except Unsupported as other:
            raise Unsupported(f"{error}; llguidance is not asked, since {other}") from None
