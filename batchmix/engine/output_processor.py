"""What steps have done: read back, taken into the batch's outputs, and handed out as completions."""

from __future__ import annotations

import time

import numpy as np
import torch

from batchmix.engine.input_batch import InputBatch
from batchmix.engine.request import Request
from batchmix.engine.scheduler import Scheduler
from batchmix.kernels.row_state import Finish
from batchmix.models.philox import row_key, uniform
from batchmix.records import Completion


def process_outputs(scheduler: Scheduler, wait_for_all: bool) -> list[Completion]:
    """Read back what steps have done, and take out what has ended. Unless it is to `wait_for_all`, the last step is not
    waited for where results come late: it runs meanwhile."""
    wait_for_steps(scheduler, wait_for_all)
    ended = np.flatnonzero(scheduler.batch.outputs.finish[: len(scheduler.running)])
    completions = [_completion(scheduler.running[slot], scheduler.batch, slot) for slot in ended.tolist()]
    for slot in ended[::-1].tolist():  # the highest first, so that slots below keep their rows
        scheduler.finish(slot)
    if completions:
        scheduler.record_answers(completion.num_tokens for completion in completions)
    for request in [request for request in scheduler.scoring if not request.num_pending]:
        scheduler.scoring.remove(request)
        scheduler.pool.release(request.blocks)
        chosen = _choices(request)
        scheduler.stats.completion_tokens += sum(completion.num_tokens for completion in chosen)
        completions += chosen
    return completions


def wait_for_steps(scheduler: Scheduler, wait_for_all: bool) -> None:
    """Read back what steps have done, as `process_outputs` does; every row stays in its slot."""
    batch, stats = scheduler.batch, scheduler.stats
    while len(batch.pending) > (batch.async_copy.late and not wait_for_all):
        step = batch.pending.popleft()
        state, ring, *logprobs = step.event()
        if step.scored is not None:
            step.scored()
        stats.completion_tokens += batch.outputs.append(step.slots, state, ring, *logprobs)
        if batch.grammars.num_texts:
            batch.grammars.accept_tokens(batch.outputs)
        stats.last_token_time = time.time()


def _completion(sequence: Request, batch: InputBatch, slot: int) -> Completion:
    """The token that ended the row is counted and left out."""
    (sample,), prompt, outputs = sequence.samples, sequence.prompt, batch.outputs
    sampling, finish, count = prompt.sampling, int(outputs.finish[slot]), int(outputs.count[slot])
    if finish == Finish.FAILED:
        row = batch.grammars.rows[slot]
        assert row is not None
        assert row.text is not None
        cut = "the text was not whole; raise sampling.max_tokens or model.max_model_len"
        why = cut if row.text.following.goes_on else row.text.error
        error = f"sampling.structured_outputs: after {row.text.count} tokens {why}"
        return Completion.failed(prompt, error, sample, count)
    stop_reason: str | int | None = None
    if finish in (Finish.STOP_TOKEN, Finish.STOP_STRING):
        reason = int(outputs.stop_reason[slot])
        stop_reason = reason if finish == Finish.STOP_TOKEN else (sampling.stop or [])[reason]
    ended_by_token = finish in (Finish.EOS, Finish.STOP_TOKEN)
    tokens = outputs.tokens[slot, :count].tolist()
    logprobs = outputs.row_logprobs(slot, sampling.logprobs) if sampling.logprobs is not None else None
    structured = sampling.structured_outputs
    wants_guided = structured is not None and structured.token_probabilities
    return Completion(
        prompt, sample,
        tokens[:-1] if ended_by_token else tokens,
        "length" if finish == Finish.LENGTH else "stop", stop_reason, num_tokens=count,
        end_token_id=tokens[-1] if ended_by_token else None,
        cumulative_logprob=None if logprobs is None else sum(entry.logprob for entry in logprobs),
        logprobs=logprobs,
        guided_logprobs=outputs.processed_logprobs[slot, :count].tolist() if wants_guided else None,
    )  # fmt: skip


def _choices(request: Request) -> list[Completion]:
    """One for each sample: the most likely choice, or one drawn at the row's temperature.

    A choice's probability is the product of those of its tokens and of its end, over the sum for all choices.
    """
    prompt, sampling, logprobs = request.prompt, request.prompt.sampling, request.logprobs
    weights = np.exp(logprobs - logprobs.max())
    probabilities = (weights / weights.sum()).tolist()
    assert request.choices is not None
    completions = []
    for sample in request.samples:
        best = int(logprobs.argmax())
        if sampling.temperature > 0:
            running = np.exp((logprobs - logprobs.max()) / sampling.temperature).cumsum()
            key = [torch.tensor([value]) for value in (sampling.seed, row_key(prompt.random_key), sample, 0)]
            best = min(int(np.searchsorted(running, float(uniform(*key)) * running[-1], "right")), len(logprobs) - 1)
        choice = request.choices[best]
        completions.append(
            Completion(prompt, sample, choice, "stop", num_tokens=len(choice), choice_probabilities=probabilities)
        )
    return completions
