"""Requests, waiting and running, what a step computes of them, and how much there may be of each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from batchmix.models.step_tokens import PrefillChunk
from batchmix.records import Prompt

PREFILL_CHUNK = 2048  # longer prompts are cut at multiples of it, so that where they are cut depends on them alone


@dataclass(frozen=True)
class EngineLimits:
    """What an engine holds at once, and how its steps are cut."""

    max_num_seqs: int
    max_num_batched_tokens: int  # of a step
    max_model_len: int  # tokens of a row
    num_blocks: int  # of the KV cache, the scratch block among them
    block_size: int  # tokens
    row_tile: int = 1  # of the operators, as the next
    cuts_prompts: bool = False  # also where a step's budget ends, not only at multiples of `prefill_chunk`
    prefill_chunk: int = PREFILL_CHUNK
    share_prefix: bool = False  # whether prompts are planned with `shared_tokens`, which are computed once
    steps_per_read: int = 1  # decode steps between two copies of what they did to the host


@dataclass(eq=False)
class Request:
    """A prompt and samples of it that start together, waiting or in prefill; and the one sample that decodes in a slot.
    With `choices` these are scored instead: the prompt's whole blocks are computed once, the rest of it with each."""

    prompt: Prompt
    samples: list[int]
    choices: list[list[int]] | None = None  # texts to score after the prompt, instead of decoding
    end_tokens: list[int] = field(default_factory=list)  # any of which ends a choice
    order: int = field(default_factory=itertools.count().__next__)  # of those that decode the last is preempted first
    # In prefill:
    blocks: list[int] = field(default_factory=list)  # of the prompt and the first sample's first token
    sample_blocks: list[int] = field(default_factory=list)  # last block of each further sample, which shares the others
    computed: int = 0  # tokens whose keys and values are in the cache, or will be once what is queued is done
    next_choice: int = 0
    num_pending: int = 0  # choices whose log-probabilities are not known
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0))  # float64, of each choice


@dataclass(frozen=True)
class ScheduledChunk(PrefillChunk):
    """Tokens of a prompt, or the rest of it and one choice, that one step computes. Its blocks: the request's, then those
    of a choice, which the next step may use for others."""

    request: Request
    token_ids: list[int]
    choice: int | None = None  # the one whose tokens' logits are wanted
    is_last: bool = False  # of its prompt: the logits of its last token start the samples


@dataclass
class Step:
    """A step for the model runner: a token of slots 0..num_decode-1, their jump-forward tokens, and chunks, the last of
    which give the slots from num_decode on their first tokens. Without jump-forward tokens and chunks it may run
    `num_steps` times before the host looks at the outcome."""

    num_decode: int
    num_steps: int = 1
    jump_forward: list[list[int]] = field(default_factory=list)  # of each slot; empty where there are none
    chunks: list[ScheduledChunk] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)  # (from, to), once keys and values are written

    @property
    def num_jump_forward(self) -> int:
        """Tokens that grammars leave no choice about."""
        return sum(map(len, self.jump_forward))

    @property
    def num_tokens(self) -> int:
        """All that it computes."""
        return self.chunks[-1].last + 1 if self.chunks else self.num_decode + self.num_jump_forward
