"""Ours and other libraries' grammars of JSON Schemas behind one interface, for bench_schemas.py."""

from __future__ import annotations

import json
import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import batchmix
from batchmix.prompts.tokenizer import load_tokenizer
from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.structured_output.compile import GrammarCompiler
from batchmix.structured_output.grammar import CompiledGrammar
from batchmix.structured_output.host_grammar import GrammarMatcher, HostGrammar, follow
from batchmix.structured_output.pattern import Unsupported

EOS, VOCAB = 2, 32_000


class Refused(Exception):
    """The schema has no grammar, in one line."""


@cache
def tokenizer() -> Any:
    return load_tokenizer(Path(batchmix.__file__).parent / "models" / "tiny")


@cache
def pieces() -> list[bytes]:
    found: list[bytes] = tokenizer().token_bytes(True)[:VOCAB]
    return found


@cache
def closing() -> np.ndarray[Any, Any]:
    """Tokens that lead to an end, as ids."""
    return np.array([token for token, piece in enumerate(pieces()) if piece[:1] in (b'"', b"}", b"]")])


def pick(allowed: np.ndarray[Any, Any], source: random.Random, hurry: bool) -> int:
    """One of the allowed tokens; short ones and those that close are likelier than in the vocabulary."""
    if source.random() < (0.9 if hurry else 0.3):
        near = closing()[allowed[closing()]]
        if len(near):
            return int(near[source.randrange(len(near))])
    ids = np.flatnonzero(allowed)
    return int(ids[source.randrange(len(ids))])


class Ours:
    def __init__(self) -> None:
        self._grammars = GrammarCompiler.of(tokenizer(), VOCAB, [EOS])
        self._grammars.get(SamplingConfig(structured_outputs=StructuredOutputs(choice=["a"])))  # the vocabulary's tree
        self._grammars.get(SamplingConfig(structured_outputs=StructuredOutputs(json={})))  # and llguidance's

    @staticmethod
    def is_installed() -> bool:
        return True

    def compile(self, schema: Any) -> Any:
        try:
            return self._grammars.get(SamplingConfig(structured_outputs=StructuredOutputs(json=json.dumps(schema))))
        except Unsupported as error:
            raise Refused(str(error)) from None

    def has_table(self, grammar: Any) -> bool:
        return isinstance(grammar, CompiledGrammar)

    def walk(self, grammar: Any, source: random.Random, budget: int) -> str | None:
        tokens: list[int] = []
        if isinstance(grammar, HostGrammar):
            matcher = GrammarMatcher(grammar)
            while len(tokens) < budget:
                allowed = matcher.following.tokens.allowed
                if matcher.may_end and (not matcher.following.goes_on or source.random() < 0.3):
                    break
                if not allowed.any():
                    return None
                token = pick(allowed, source, len(tokens) > 40)
                if token == EOS:
                    break
                tokens.append(token)
                matcher.take([token])
                follow([matcher])
            return text_of(tokens) if matcher.may_end else None
        state = grammar.start
        budget = max(source.choice([1, 20, 60, budget]), grammar.tokens_needed(0))
        while not grammar.is_over(state) and len(tokens) < budget:
            allowed = grammar.allowed_tokens(state, budget - len(tokens) - 1).allowed
            if not allowed.any():
                return None
            token = pick(allowed, source, False)
            if token == EOS:
                break
            tokens.append(token)
            state = grammar.next_state(state, token)
        return text_of(tokens) if grammar.may_end(state) else None

    def accepts(self, grammar: Any, text: str) -> bool:
        try:
            ids = list(tokenizer().encode_texts([text])[0])[1:]
        except TypeError:  # sentencepiece's, of half a surrogate pair
            return False
        if isinstance(grammar, HostGrammar):
            matcher = GrammarMatcher(grammar)
            for token in ids:
                if not matcher.following.tokens.allowed[token]:
                    return False
                matcher.take([token])
                follow([matcher])
            return bool(matcher.may_end)
        state = grammar.start
        for token in ids:
            if not grammar.is_allowed(state, token, 2**20):
                return False
            state = grammar.next_state(state, token)
        return bool(grammar.may_end(state))


def text_of(tokens: list[int]) -> str:
    from batchmix.prompts.vocabulary import strip_start

    return strip_start(b"".join(pieces()[token] for token in tokens), True).decode(errors="replace")


class LLGuidance:
    def __init__(self) -> None:
        import llguidance

        self._library = llguidance
        grammars = GrammarCompiler.of(tokenizer(), VOCAB, [EOS])
        host = grammars.get(SamplingConfig(structured_outputs=StructuredOutputs(json={})))
        assert isinstance(host, HostGrammar)
        self._vocabulary = host.vocabulary

    @staticmethod
    def is_installed() -> bool:
        return find_spec("llguidance") is not None

    def compile(self, schema: Any) -> Any:
        text = self._library.LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        )
        matcher = self._library.LLMatcher(self._vocabulary._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise Refused(matcher.get_error()[:300])
        return matcher

    def has_table(self, grammar: Any) -> bool:
        return False

    def walk(self, grammar: Any, source: random.Random, budget: int) -> str | None:
        matcher, tokens = grammar.deep_copy(), list[int]()
        while len(tokens) < budget:
            if matcher.is_accepting() and source.random() < 0.3:
                break
            mask = self._vocabulary.masks([matcher])[0]
            allowed = np.unpackbits(mask, count=VOCAB, bitorder="little").view(np.bool_)
            if not allowed.any():
                break
            tokens.append(pick(allowed, source, len(tokens) > 40))
            matcher.consume_token(tokens[-1])
        return (
            b"".join(pieces()[token] for token in tokens).decode(errors="replace") if matcher.is_accepting() else None
        )

    def accepts(self, grammar: Any, text: str) -> bool:
        matcher = grammar.deep_copy()
        ids = [3 + byte for byte in text.encode()]  # SentencePiece's single bytes
        return all(matcher.consume_token(token) for token in ids) and bool(matcher.is_accepting())


class XGrammar:
    def __init__(self) -> None:
        import xgrammar

        self._library = xgrammar
        self._info = xgrammar.TokenizerInfo(list(pieces()), vocab_type=xgrammar.VocabType.RAW, vocab_size=VOCAB,
                                            stop_token_ids=[EOS])  # fmt: skip
        self._compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)

    @staticmethod
    def is_installed() -> bool:
        return find_spec("xgrammar") is not None

    def compile(self, schema: Any) -> Any:
        return self._compiler.compile_json_schema(json.dumps(schema), any_whitespace=False, separators=(", ", ": "),
                                                  strict_mode=True)  # fmt: skip

    def has_table(self, grammar: Any) -> bool:
        return False

    def walk(self, grammar: Any, source: random.Random, budget: int) -> str | None:
        matcher, tokens = self._library.GrammarMatcher(grammar, terminate_without_stop_token=True), list[int]()
        bits = self._library.allocate_token_bitmask(1, VOCAB)
        while len(tokens) < budget and not matcher.is_terminated():
            matcher.fill_next_token_bitmask(bits)
            allowed = np.unpackbits(bits.numpy().view(np.uint8)[0], count=VOCAB, bitorder="little").view(np.bool_)
            if allowed[EOS] and source.random() < 0.3:
                return b"".join(pieces()[token] for token in tokens).decode(errors="replace")
            allowed[EOS] = False
            if not allowed.any():
                return None
            tokens.append(pick(allowed, source, len(tokens) > 40))
            matcher.accept_token(tokens[-1])
        return (
            b"".join(pieces()[token] for token in tokens).decode(errors="replace") if matcher.is_terminated() else None
        )

    def accepts(self, grammar: Any, text: str) -> bool:
        matcher = self._library.GrammarMatcher(grammar, terminate_without_stop_token=True)
        return all(matcher.accept_token(3 + byte) for byte in text.encode()) and bool(matcher.is_terminated())


ENGINES: dict[str, Any] = {"batchmix": Ours, "llguidance": LLGuidance, "xgrammar": XGrammar}
