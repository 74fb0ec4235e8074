"""Rows whose grammar has no table: the host follows their texts and tells the device which tokens may come next.

To a step such a row has a grammar like the others, of a single state and two classes of tokens; which token is of which class
the host writes anew before each choice. A step queues the model first, then reads back the tokens before it and finds the
masks while the device computes, so that both work at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from batchmix.engine.output_buffers import OutputBuffers
from batchmix.models.async_copy import async_copy_to_gpu
from batchmix.structured_output.grammar import NEVER_ENDS, TokenSet
from batchmix.structured_output.host_grammar import Following, GrammarMatcher, follow

FORBIDDEN, ALLOWED = 1, 2  # classes of tokens
# [1 + classes, 2], see CompiledGrammar; the host sees a text's end.
ONE_STATE = torch.tensor([[0, 0], [0, NEVER_ENDS], [0, 0]])


class GrammarMatchers:
    """By slot."""

    def __init__(self, size: int) -> None:
        self._texts: list[GrammarMatcher | None] = [None] * size
        self._count = 0  # of those there are
        self._class_rows = np.zeros(size, np.int64)  # of GrammarTables.classes

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self._count > 0

    def __getitem__(self, slot: int) -> GrammarMatcher | None:
        return self._texts[slot]

    def put(self, slot: int, text: GrammarMatcher, class_row: int) -> None:
        """A row begins."""
        self.clear(slot)
        self._count += 1
        self._texts[slot], self._class_rows[slot] = text, class_row

    def move(self, target: int, source: int) -> None:
        """The row of slot `source` is now in slot `target`."""
        self._count += (self._texts[source] is not None) - (self._texts[target] is not None)
        self._texts[target], self._class_rows[target] = self._texts[source], self._class_rows[source]

    def clear(self, slot: int) -> None:
        """There is no such row in the slot."""
        self._count -= self._texts[slot] is not None
        self._texts[slot] = None

    def allowed(self, slot: int) -> TokenSet:
        """The tokens that may come next."""
        return self._following(slot).tokens

    def _following(self, slot: int) -> Following:
        text = self._texts[slot]
        assert text is not None
        # In the step that was on its way when the host saw the text's end: what it chooses is dropped.
        return text.following if text.following.goes_on else text.grammar.vocabulary.anything

    def accept_tokens(
        self, outputs: OutputBuffers, is_running: np.ndarray, is_cut: np.ndarray
    ) -> Iterator[tuple[int, GrammarMatcher]]:
        """Take what rows have answered, and find what may follow; the slots whose text cannot go on, or may not.

        bool [slots] each: rows that run, and rows that max_tokens has ended, whose last token belongs to the text.
        """
        if not self._count:
            return
        followed: list[tuple[int, GrammarMatcher]] = []
        longer: list[GrammarMatcher] = []
        for slot, text in enumerate(self._texts):
            if text is not None and (is_running[slot] or is_cut[slot]):
                followed.append((slot, text))
                count = int(outputs.count[slot])
                if count > text.count:
                    text.take(outputs.tokens[slot, text.count : count].tolist())
                    longer.append(text)
        follow(longer)
        for slot, text in followed:
            if is_cut[slot] or not text.following.goes_on:
                yield slot, text

    def fill_bitmask(self, span: slice, classes: Tensor) -> None:
        """Write what may come next in these slots into `classes` int32 [grammars, V], in the order of the device's work."""
        slots = [slot for slot in range(span.start, span.stop) if self._texts[slot] is not None] if self._count else []
        if not slots:
            return
        masks = np.stack([self._following(slot).packed for slot in slots])  # uint8 [N, V / 8]
        packed = async_copy_to_gpu(masks, classes.device)
        bits = packed[:, :, None] >> torch.arange(8, device=classes.device, dtype=torch.uint8) & 1
        rows = async_copy_to_gpu(self._class_rows[slots], classes.device)
        classes.index_copy_(0, rows, bits.flatten(1)[:, : classes.shape[1]].int() * (ALLOWED - FORBIDDEN) + FORBIDDEN)
