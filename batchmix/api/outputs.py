"""What `LLM` returns, in vLLM's classes: an output for each prompt, and in it a completion for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchmix.prompts.tokenizer import Tokenizer
from batchmix.records import Completion, FinishReason, TokenLogprob


@dataclass
class Logprob:
    """The log-probability of a token, as the model has it before temperature, penalties and biases."""

    logprob: float
    rank: int | None = None  # in the whole vocabulary, from 1
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One sample of one prompt."""

    index: int
    text: str
    token_ids: list[int]  # with the end-of-sequence or stop token that ended it, which `text` is without
    cumulative_logprob: float | None  # None without SamplingParams.logprobs, as the next
    logprobs: list[dict[int, Logprob]] | None  # of each token: itself first, then the most likely ones
    finish_reason: FinishReason
    stop_reason: str | int | None = None  # the stop string or stop token; None for the end of the sequence
    choice_probabilities: Sequence[float] | None = None  # with StructuredOutputsParams.score_choices
    guided_logprobs: Sequence[float] | None = None  # with StructuredOutputsParams.token_probabilities

    def finished(self) -> bool:
        return True


@dataclass
class RequestOutput:
    """The answer to one prompt. `error` says in one line why it has none, or a sample of it: the `finish_reason` of such a
    completion is "error"."""

    request_id: str  # the prompt's place in the call, from 0
    prompt: str | None  # its text; None where token ids were given
    prompt_token_ids: list[int] | None  # None where the prompt could not be encoded
    outputs: list[CompletionOutput]
    error: str | None = None
    prompt_logprobs: None = None  # not computed
    finished: bool = True


def request_output(samples: Sequence[Completion], prompt: str | None, tokenizer: Tokenizer | None) -> RequestOutput:
    """The output of all samples of one prompt, whose texts are there already. `prompt`: its own."""
    row = samples[0].prompt
    pieces = tokenizer.token_bytes(False) if tokenizer is not None else []
    return RequestOutput(
        request_id=str(row.row),
        prompt=prompt,
        prompt_token_ids=list(row.token_ids) or None,
        outputs=[_completion_output(sample, pieces) for sample in samples],
        error=next((sample.error for sample in samples if sample.error is not None), None),
    )


def _completion_output(sample: Completion, pieces: Sequence[bytes]) -> CompletionOutput:
    end = [] if sample.end_token_id is None else [sample.end_token_id]
    return CompletionOutput(
        index=sample.sample_index,
        text=sample.text or "",
        token_ids=[*sample.token_ids, *end],
        cumulative_logprob=sample.cumulative_logprob,
        logprobs=None if sample.logprobs is None else [_logprobs(entry, pieces) for entry in sample.logprobs],
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
        choice_probabilities=sample.choice_probabilities,
        guided_logprobs=sample.guided_logprobs,
    )


def _logprobs(entry: TokenLogprob, pieces: Sequence[bytes]) -> dict[int, Logprob]:
    def decoded(token: int) -> str | None:
        return pieces[token].decode(errors="replace") if token < len(pieces) else None

    found = {entry.token_id: Logprob(entry.logprob, entry.rank, decoded(entry.token_id))}
    for place, (token, logprob) in enumerate(entry.top):
        found.setdefault(token, Logprob(logprob, place + 1, decoded(token)))
    return found
