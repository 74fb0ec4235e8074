"""Rows that have ended, as what the engine gives out."""

from __future__ import annotations

import time

import numpy as np

from batchmix.engine.slots import InputBatch
from batchmix.engine.state import Row, State
from batchmix.kernels.row_state import Finish
from batchmix.records import Completion, FinishReason

_FINISH_REASON: dict[int, FinishReason] = {
    Finish.EOS: "stop", Finish.STOP_TOKEN: "stop", Finish.STOP_STRING: "stop", Finish.WHOLE: "stop",
    Finish.LENGTH: "length",
}  # fmt: skip


def hear(state: State, all_of_it: bool) -> None:
    """See what the steps that are queued have done, and take the rows that have ended out of the batch.

    Waits for them. Unless it has to be `all_of_it`, the last window is not waited for where it comes late.
    """
    listen(state, all_of_it)
    _collect(state)


def listen(state: State, all_of_it: bool) -> None:
    """See what the steps that are queued have done, as `hear` does; every row stays in its slot."""
    looks = state.slots.looks
    while len(looks) > (state.slots.async_copy.late and not all_of_it):
        state.stats.completion_tokens += state.slots.hear()
        state.stats.last_token_time = time.time()


def _collect(state: State) -> None:
    ended = np.flatnonzero(state.slots.answers.finish[: len(state.rows)])
    completions = [_completion(state.rows[slot], state.slots, slot) for slot in ended.tolist()]
    for slot in ended[::-1].tolist():  # the highest first, so that slots below keep their rows
        state.free(slot)
    if completions:
        mean = sum(completion.num_tokens for completion in completions) / len(completions)
        state.mean_length = 0.9 * state.mean_length + 0.1 * mean if state.mean_length else mean
        state.completed += completions


def _completion(row: Row, slots: InputBatch, slot: int) -> Completion:
    """The token that ended the row is counted and left out."""
    sampling, answers = row.prompt.sampling, slots.answers
    finish, count = int(answers.finish[slot]), int(answers.count[slot])
    if finish == Finish.FAILED:
        return Completion.failed(row.prompt, _why_it_failed(row, slots, slot), row.sample, count)
    tokens = answers.tokens[slot, : count - (finish in (Finish.EOS, Finish.STOP_TOKEN))].tolist()
    stop_reason: str | int | None = None
    if finish == Finish.STOP_TOKEN:
        stop_reason = int(answers.stop_reason[slot])
    elif finish == Finish.STOP_STRING:
        stop_reason = (sampling.stop or [])[int(answers.stop_reason[slot])]
    logprobs = answers.row_logprobs(slot, sampling.logprobs) if sampling.logprobs is not None else None
    return Completion(
        row.prompt,
        row.sample,
        tokens,
        _FINISH_REASON[finish],
        stop_reason,
        num_tokens=count,
        cumulative_logprob=None if logprobs is None else sum(entry.logprob for entry in logprobs),
        logprobs=logprobs,
        guided_logprobs=_guided_logprobs(row, slots, slot, count),
    )


def _guided_logprobs(row: Row, slots: InputBatch, slot: int, count: int) -> list[float] | None:
    outputs = row.prompt.sampling.structured_outputs
    if outputs is None or not outputs.token_probabilities:
        return None
    found: list[float] = slots.answers.processed_logprobs[slot, :count].tolist()
    return found


def _why_it_failed(row: Row, slots: InputBatch, slot: int) -> str:
    text = slots.grammars.texts[slot]
    assert text is not None
    why = (
        "the text was not whole; raise sampling.max_tokens or model.max_model_len"
        if text.following.goes_on
        else text.error
    )
    return f"sampling.structured_outputs: after {text.count} tokens {why}"
