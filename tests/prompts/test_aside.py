"""Rows whose grammars take long to compile hold up no others."""

from __future__ import annotations

import threading
from array import array
from typing import Any

import pytest
from prompts import build_prompts

from batchmix.input.config import DataConfig
from batchmix.observability.clock import StageClock
from batchmix.planning.planner import Limits, plan
from batchmix.prompts import prompt as prompt_module
from batchmix.prompts.aside import Aside
from batchmix.prompts.prompt import PromptBuilder
from batchmix.prompts.row_sampling import RowSamplings
from batchmix.records import InputRow
from batchmix.sampling import SamplingConfig
from batchmix.templates.messages import PromptError


def test_items_come_back_once_they_are_done() -> None:
    go = threading.Event()
    aside: Aside[int] = Aside(lambda item: None if item < 2 else void(go.wait(20)), capacity=3)
    for item in range(3):
        assert not aside.full
        aside.put(item)
    assert aside.full
    found = aside.take(20)
    while len(found) < 2:
        found += aside.take(20)
    assert (found, len(aside)) == ([0, 1], 1)
    assert aside.take(0.01) == []
    go.set()
    assert aside.take(20) == [2]
    assert not aside
    aside.close()


def void(_: object) -> None:
    return None


def rows(count: int, costly: int) -> list[InputRow]:
    """`costly` rows with a grammar of their own before the others."""
    found = []
    for number in range(count):
        sampling = {"structured_outputs": {"regex": f"a{{{number + 1}}}"}} if number < costly else None
        found.append(InputRow(number, str(number), {"prompt_token_ids": [5]}, sampling=sampling))
    return found


@pytest.mark.parametrize("error", [None, "no"])
def test_rows_behind_costly_ones_come_first(error: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    go, compiled = threading.Event(), []
    merged = RowSamplings.merged

    def slow(self: Any, overrides: Any) -> SamplingConfig:
        if overrides:
            compiled.append(threading.current_thread().name)
            assert go.wait(20)
            if error:
                raise PromptError(error)
            return SamplingConfig(max_tokens=7)
        return merged(self, overrides)

    monkeypatch.setattr(RowSamplings, "merged", slow)
    builder = PromptBuilder(DataConfig("x"), SamplingConfig(), None, max_model_len=16, vocab_size=10)
    prompts = builder.build(rows(10, 3), keep=[], clock=StageClock())
    batches = plan(prompts, Limits(100, 100, 4, sort_window=1000))
    assert [prompt.row for prompt in next(batches).prompts] == [3, 4, 5, 6, 7, 8, 9]
    assert next(batches).prompts == [], "the engine goes on with what it has"
    go.set()
    rest = [prompt for batch in batches for prompt in batch.prompts]
    assert sorted(prompt.row for prompt in rest) == [0, 1, 2]
    assert compiled == ["aside"] * 3, "compiled once, and by no thread that others wait for"
    for prompt in rest:
        assert prompt.error == error
        assert error or (prompt.sampling.max_tokens, prompt.token_ids) == (7, array("i", [5]))


def test_no_more_rows_are_put_aside_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_module, "_MOST_ASIDE", 2)
    prompts = build_prompts(
        rows(30, 25), data=DataConfig("x"), sampling=SamplingConfig(), tokenizer=None, max_model_len=16, vocab_size=10,
        keep=[], clock=StageClock(),
    )  # fmt: skip
    assert sorted(prompt.row for prompt in prompts) == list(range(30))
