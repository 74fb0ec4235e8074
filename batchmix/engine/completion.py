"""A row that has ended, as what the engine gives out."""

from __future__ import annotations

from batchmix.engine.slots import EOS, LENGTH, STOP_STRING, STOP_TOKEN, Slots
from batchmix.engine.state import Row
from batchmix.records import Completion, FinishReason

_FINISH_REASON: dict[int, FinishReason] = {EOS: "stop", STOP_TOKEN: "stop", STOP_STRING: "stop", LENGTH: "length"}


def completion(row: Row, slots: Slots, slot: int) -> Completion:
    """The row of a slot that has ended; the token that ended it is counted and left out."""
    sampling = row.prompt.sampling
    finish, count = int(slots.host["finish"][slot]), int(slots.num_read[slot])
    tokens = slots.tokens[slot, : count - (finish in (EOS, STOP_TOKEN))].tolist()
    stop_reason: str | int | None = None
    if finish == STOP_TOKEN:
        stop_reason = int(slots.host["stop_reason"][slot])
    elif finish == STOP_STRING:
        stop_reason = (sampling.stop or [])[int(slots.host["stop_reason"][slot])]
    logprobs = slots.row_logprobs(slot) if sampling.logprobs is not None else None
    return Completion(
        row.prompt,
        row.sample,
        tokens,
        _FINISH_REASON[finish],
        stop_reason,
        num_tokens=count,
        cumulative_logprob=None if logprobs is None else sum(entry.logprob for entry in logprobs),
        logprobs=logprobs,
    )
