"""How tokens are chosen: the keys of `sampling`, of the run and of a row's own `sampling` column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchmix.config_key import key

MAX_SCORED_CHOICES = 256  # each is a prefill chunk of its own


@dataclass
class StructuredOutputs:
    """What a row's text may be: one of the first three, which are vLLM's. See docs/guided.md."""

    choice: list[str] | None = key(None, "the answer is one of these texts")
    regex: str | None = key(None, "the answer is a text that Python's re.fullmatch accepts")
    json: Any = key(None, "the answer is JSON that fits this JSON Schema, a mapping or JSON text")
    score_choices: bool = key(
        False, "compute each choice's probability in the prefill, and decode nothing; 256 choices at most"
    )
    token_probabilities: bool = key(
        False, "add the column guided_logprobs: each token's log-probability among the allowed tokens"
    )


@dataclass
class SamplingConfig:
    """How tokens are chosen. A row's own `sampling` column overrides any of these for that row.

    Reals are used as float32 and checked as such: 1e-46 would be 0 there, and is refused.
    """

    max_tokens: int = key(1024, "most tokens of an answer")
    min_tokens: int = key(0, "fewest tokens of an answer")
    temperature: float = key(1.0, "0: greedy decoding")
    top_p: float = key(1.0, "draw from the most likely tokens whose probabilities sum to this")
    top_k: int = key(0, "draw from this many of the most likely tokens; 0 or -1: all")
    min_p: float = key(0.0, "draw from tokens with at least this share of the highest probability")
    repetition_penalty: float = key(1.0, "for tokens that are in the prompt or the answer, 1e-6 to 1e6; 1: none")
    presence_penalty: float = key(0.0, "for tokens that are in the answer, -2 to 2")
    frequency_penalty: float = key(0.0, "for tokens that are in the answer, for each occurrence, -2 to 2")
    logit_bias: dict[int, float] | None = key(None, "{token id: number that is added to its logit}, from -1e30 to 1e30")
    allowed_token_ids: list[int] | None = key(None, "the only tokens that an answer may have; null: all")
    stop: list[str] | None = key(None, "texts that end an answer, 1,024 bytes in all at most")
    stop_token_ids: list[int] | None = key(None, "tokens that end an answer, besides the model's own; 1,024 at most")
    include_stop_str_in_output: bool = key(False, "keep the stop text that ended an answer")
    skip_special_tokens: bool = key(True, "leave control tokens out of the text")
    seed: int = key(0, "seed of the random numbers, which are keyed by seed, row, sample and position")
    n: int = key(1, "samples per row, at most 10,000")
    logprobs: int | None = key(
        None, "also write log-probabilities: of each token, and of this many most likely ones; 100 at most"
    )
    ignore_eos: bool = key(False, "go on after the model's end token")
    structured_outputs: StructuredOutputs | None = key(None, "guided decoding: what an answer may be; null: any text")
