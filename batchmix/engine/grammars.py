"""The grammars of running rows: their tables on the device, and what the host knows of each row's text.

The text of a grammar without a table is followed on the host. To a step its row has a grammar of a single state and two
classes of tokens, allowed or not, which the host writes anew before each choice, while the device runs the model.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchmix.engine.device_tables import DeviceTableCache
from batchmix.engine.output_buffers import OutputBuffers
from batchmix.kernels.row_state import Finish
from batchmix.models.async_copy import async_copy_to_gpu
from batchmix.sampling import SamplingConfig
from batchmix.structured_output.automata import NEVER_ENDS
from batchmix.structured_output.compile import GrammarCompiler, grammar_key
from batchmix.structured_output.grammar import CompiledGrammar, TokenSet
from batchmix.structured_output.host_grammar import Following, GrammarMatcher, HostGrammar, follow

_FORBIDDEN, _ALLOWED = 1, 2  # classes of tokens of a text that the host follows
_ONE_STATE = torch.tensor([[0, 0], [0, NEVER_ENDS], [0, 0]])  # [1 + classes, 2], see CompiledGrammar


@dataclass
class GuidedRow:
    """A row's grammar with a table, and its state after `count` tokens; or its text, which the host follows."""

    key: Hashable  # of its tables in `states` and `classes`
    grammar: CompiledGrammar | None
    text: GrammarMatcher | None
    state: int = 0
    count: int = 0
    class_row: int = -1  # in `classes`

    def follow(self, tokens: np.ndarray, count: int) -> int:
        """The state after the first `count` tokens; never fewer than at the last call."""
        assert self.grammar is not None
        if self.count < count:
            self.state = self.grammar.after(self.state, tokens[self.count : count].tolist())
            self.count = count
        return self.state

    def following(self) -> Following:
        """What may come next in a text that the host follows."""
        assert self.text is not None
        # In the step that was on its way when the host saw the text's end: what it chooses is dropped.
        return self.text.following if self.text.following.goes_on else self.text.grammar.vocabulary.anything


class RowGrammars:
    """By slot; `states` [rows, 2] and `classes` [grammars, V] are the tables of all grammars, see CompiledGrammar."""

    def __init__(self, compiler: GrammarCompiler | None, vocab_size: int, device: torch.device, size: int) -> None:
        self._compiler = compiler
        self.states = DeviceTableCache(2, torch.int32, device)
        self.classes = DeviceTableCache(vocab_size, torch.int32, device)
        self.rows: list[GuidedRow | None] = [None] * size
        self.num_texts = 0  # that the host follows
        self.num_forced = 0  # rows whose grammar may leave no choice

    def acquire(self, slot: int, sampling: SamplingConfig, max_tokens: int) -> tuple[int, int, int]:
        """The row's grammar: where it begins in `states`, its row in `classes`, and the first state."""
        assert self._compiler is not None, "rows with structured_outputs are refused where there is no tokenizer"
        grammar, key = self._compiler.get(sampling), grammar_key(sampling)
        assert grammar.tokens_needed(sampling.min_tokens) <= max_tokens, "rows without room for an answer are refused"
        if isinstance(grammar, HostGrammar):
            text = GrammarMatcher(grammar)
            row = GuidedRow(text, None, text)
            table, classes = _ONE_STATE, torch.full((1, self.classes.data.shape[1]), _ALLOWED)
            self.num_texts += 1
        else:
            row = GuidedRow(key, grammar, None, grammar.start)
            self.num_forced += bool(grammar.forced)
            table, classes = torch.from_numpy(grammar.table), torch.from_numpy(grammar.token_class)[None]
        self.rows[slot] = row
        row.class_row = self.classes.acquire(row.key, lambda: classes)
        return self.states.acquire(row.key, lambda: table), row.class_row, row.state

    def release(self, slot: int) -> None:
        """The slot's row goes."""
        if (row := self.rows[slot]) is not None:
            self.num_texts -= row.text is not None
            self.num_forced -= row.grammar is not None and bool(row.grammar.forced)
            self.states.release(row.key)
            self.classes.release(row.key)

    def allowed_tokens(self, slot: int, state: int, left: int) -> TokenSet:
        """What the slot's row may choose from in a state of its grammar, with `left` tokens after this one."""
        row = self.rows[slot]
        assert row is not None
        return row.following().tokens if row.grammar is None else row.grammar.allowed_tokens(state, left)

    def accept_tokens(self, outputs: OutputBuffers) -> None:
        """Follow the texts, find what may come next, and end rows whose text cannot go on, or is cut short."""
        followed: list[tuple[int, GrammarMatcher]] = []
        longer: list[GrammarMatcher] = []
        for slot, row in enumerate(self.rows):
            # The last token of a row that max_tokens has ended belongs to the text.
            if row is None or row.text is None or outputs.finish[slot] not in (Finish.RUNNING, Finish.LENGTH):
                continue
            count = int(outputs.count[slot])
            followed.append((slot, row.text))
            if count > row.text.count:
                row.text.take(outputs.tokens[slot, row.text.count : count].tolist())
                longer.append(row.text)
        follow(longer)
        for slot, text in followed:
            is_cut = outputs.finish[slot] == Finish.LENGTH and not text.may_end
            if is_cut or not text.following.goes_on:
                outputs.finish[slot] = Finish.WHOLE if text.may_end else Finish.FAILED

    def fill_bitmask(self, classes: Tensor) -> None:
        """Write what may come next in the texts that the host follows into their rows of `classes` int32 [grammars, V],
        in the order of the device's work."""
        if not self.num_texts:
            return
        texts = [row for row in self.rows if row is not None and row.text is not None]
        masks = np.stack([row.following().packed for row in texts])  # uint8 [texts, V / 8]
        packed = async_copy_to_gpu(masks, classes.device)
        bits = packed[:, :, None] >> torch.arange(8, device=classes.device, dtype=torch.uint8) & 1
        rows = async_copy_to_gpu(np.array([row.class_row for row in texts]), classes.device)
        allowed = bits.flatten(1)[:, : classes.shape[1]].int()
        classes.index_copy_(0, rows, allowed * (_ALLOWED - _FORBIDDEN) + _FORBIDDEN)
