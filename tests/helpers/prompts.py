"""Rows to prompts in one call, for tests."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any

from batchmix.observability.clock import StageClock
from batchmix.prompts.prompt import PromptBuilder, without_pauses
from batchmix.records import InputRow, Prompt


def build_prompts(
    rows: Iterable[InputRow], *, keep: Sequence[str], clock: StageClock, **how: Any
) -> Generator[Prompt, None, None]:
    """`how` is what `PromptBuilder` is made of."""
    data, sampling, tokenizer = (how.pop(name) for name in ("data", "sampling", "tokenizer"))
    return without_pauses(PromptBuilder(data, sampling, tokenizer, **how).build(rows, keep=keep, clock=clock))
