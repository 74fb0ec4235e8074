"""The one record type that crosses each boundary: InputRow -> Prompt -> Batch -> Completion.

    source --InputRow--> prompt --Prompt--> plan --Batch--> engine --Completion--> sink

A record that cannot be run carries its reason in `error` and travels the same way as the others, so that
every input row reaches the output exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from batchmix.sampling import SamplingConfig

FinishReason = Literal["stop", "length", "error"]


@dataclass(slots=True)
class InputRow:
    """One input row as it was read."""

    row: int  # ordinal in the data set, stable over resume and sharding
    id: str  # what the row is called: its `data.id_column`, `id`, `custom_id` or `uuid`, else str(row)
    columns: dict[str, Any]  # the input's columns; empty where the line could not be parsed
    sampling: Mapping[str, Any] | None = None  # the row's own overrides of `sampling.*`, not yet validated
    error: str | None = None  # one line: why this row cannot be run
    text: str | None = None  # the prompt of a /v1/completions request, which no chat template applies to
    key: str | None = None  # what keys its random numbers; None: its id


@dataclass(slots=True)
class Prompt:
    """One row as token ids, with the sampling parameters that hold for it."""

    row: int
    id: str
    columns: dict[str, Any]  # only those that the output keeps
    token_ids: Sequence[int]  # empty where `error` is set
    sampling: SamplingConfig
    error: str | None = None
    shared_tokens: int = 0  # leading ones that other prompts of its window begin with too; set by plan
    num_bytes: int = 0  # of memory, about: its columns and token ids
    samples: Sequence[int] | None = None  # of the row's `sampling.n`, those that start from this prompt; None: all
    key: str | None = None  # what keys its random numbers; None: its id

    @property
    def random_key(self) -> str:
        return self.id if self.key is None else self.key

    @property
    def num_samples(self) -> int:
        """Completions that this prompt will have."""
        return self.sampling.n if self.samples is None else len(self.samples)


@dataclass(slots=True)
class Batch:
    """Prompts of one bucket, longest first, that the engine runs as one static batch of slots."""

    prompts: list[Prompt]


@dataclass(slots=True, frozen=True)
class TokenLogprob:
    """The log-probability of one generated token, and those of the most likely alternatives."""

    token_id: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()  # (token id, logprob), most likely first
    rank: int | None = None  # of the token in the whole vocabulary, from 1


@dataclass(slots=True)
class Completion:
    """One sample of one prompt. `text` and `token_ends` are filled when the sink detokenises."""

    prompt: Prompt
    sample_index: int
    token_ids: Sequence[int]  # without the stop token; with the tokens that complete a stop string
    finish_reason: FinishReason
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it; None for end of sequence
    num_tokens: int = 0  # generated tokens, stop token included
    end_token_id: int | None = None  # the end-of-sequence or stop token that ended it
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprob] | None = field(default=None, repr=False)
    guided_logprobs: Sequence[float] | None = None  # of each token, the stop token included, among those allowed there
    token_ends: Sequence[int] | None = None  # where each of those tokens ends in `text`, in bytes; with guided_logprobs
    choice_probabilities: Sequence[float] | None = None  # of structured_outputs.choice, in its order, where scored
    error: str | None = None
    text: str | None = None

    @classmethod
    def failed(cls, prompt: Prompt, error: str, sample_index: int = 0, num_tokens: int = 0) -> Completion:
        """A prompt that could not be run (`prompt.error`; one stands for all its samples), or a sample without an answer."""
        return cls(prompt, sample_index, (), "error", num_tokens=num_tokens, error=error)


class RowSamples:
    """Gathers the samples of each row, of which several rows are under way."""

    def __init__(self) -> None:
        self._incomplete: dict[int, list[Completion]] = {}

    def add(self, completion: Completion) -> list[Completion]:
        """All samples of the row in their order, if this was the last that was missing, else none. A prompt that could not
        be run has one completion for all."""
        prompt = completion.prompt
        if prompt.error is not None or prompt.sampling.n == 1:
            return [completion]
        samples = self._incomplete.setdefault(prompt.row, [])
        samples.append(completion)
        if len(samples) < prompt.sampling.n:
            return []
        return sorted(self._incomplete.pop(prompt.row), key=lambda sample: sample.sample_index)
