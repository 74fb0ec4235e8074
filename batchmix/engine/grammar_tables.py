"""The grammars of running rows: their tables on the device, and which slot's row follows which."""

from __future__ import annotations

import numpy as np
import torch

from batchmix.engine.device_tables import DeviceTableCache
from batchmix.engine.grammar_matchers import ALLOWED, ONE_STATE, GrammarMatchers
from batchmix.sampling import SamplingConfig
from batchmix.structured_output.compile import GrammarCompiler, grammar_key
from batchmix.structured_output.grammar import CompiledGrammar, TokenSet
from batchmix.structured_output.host_grammar import GrammarMatcher, HostGrammar


class GrammarTables:
    """Of all grammars in use: `states` [rows, 2], their tables, `classes` [grammars, V], their tokens' classes.

    See CompiledGrammar.
    """

    def __init__(self, grammars: GrammarCompiler | None, vocab_size: int, device: torch.device, size: int) -> None:
        self._grammars = grammars
        self.states = DeviceTableCache(2, torch.int32, device)
        self.classes = DeviceTableCache(vocab_size, torch.int32, device)
        self.of_slot: list[CompiledGrammar | None] = [None] * size
        self.texts = GrammarMatchers(size)  # of rows whose grammar has no table
        # Tokens of the row, and the grammar's state after them, as far as it was asked.
        self._followed = [(0, 0)] * size

    @property
    def used(self) -> bool:
        """Whether there has been a row with a grammar: without any, steps do not look for them."""
        return len(self.states.data) > 0

    def acquire(self, slot: int, sampling: SamplingConfig, max_tokens: int) -> tuple[int, int, int]:
        """The row's grammar: where it begins in `states`, its row in `classes`, and the state of a text without tokens."""
        assert self._grammars is not None, "rows with structured_outputs are refused where there is no tokenizer"
        grammar, key = self._grammars.get(sampling), grammar_key(sampling)
        assert grammar.tokens_needed(sampling.min_tokens) <= max_tokens, "rows without room for an answer are refused"
        if isinstance(grammar, HostGrammar):
            return self._acquire_text(slot, GrammarMatcher(grammar))
        self.of_slot[slot], self._followed[slot] = grammar, (0, grammar.start)
        base = self.states.acquire(key, lambda: torch.from_numpy(grammar.table))
        return base, self.classes.acquire(key, lambda: torch.from_numpy(grammar.token_class)[None]), grammar.start

    def _acquire_text(self, slot: int, text: GrammarMatcher) -> tuple[int, int, int]:
        width = self.classes.data.shape[1]
        row = self.classes.acquire(text, lambda: torch.full((1, width), ALLOWED))
        self.texts.put(slot, text, row)
        return self.states.acquire("text", lambda: ONE_STATE), row, 0

    def follow(self, slot: int, tokens: np.ndarray, count: int) -> int:
        """The state of the slot's row after its first `count` tokens; never fewer than at the last call."""
        grammar = self.of_slot[slot]
        assert grammar is not None
        known, state = self._followed[slot]
        if known < count:
            state = grammar.after(state, tokens[known:count].tolist())
            self._followed[slot] = count, state
        return state

    def allowed_tokens(self, slot: int, state: int, left: int) -> TokenSet:
        """What the slot's row may choose from in a state of its grammar, with `left` tokens after this one."""
        grammar = self.of_slot[slot]
        return self.texts.allowed(slot) if grammar is None else grammar.allowed_tokens(state, left)

    def move(self, target: int, source: int) -> None:
        """The row of slot `source` is now in slot `target`."""
        self.of_slot[target], self._followed[target] = self.of_slot[source], self._followed[source]
        self.texts.move(target, source)

    def clear(self, slot: int) -> None:
        """The slot has no row."""
        self.of_slot[slot] = None
        self.texts.clear(slot)

    def release(self, slot: int, sampling: SamplingConfig) -> None:
        """The slot's row is gone, or goes."""
        if sampling.structured_outputs is None:
            return
        key = grammar_key(sampling)
        text = self.texts[slot]
        self.states.release(key if text is None else "text")
        self.classes.release(key if text is None else text)
