"""How tokens are chosen: the keys of `sampling`, of the run and of a row's own `sampling` column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchmix.config_key import key

MAX_SCORED_CHOICES = 256  # each is a prefill chunk of its own


@dataclass
class StructuredOutputs:
    """What a row's text may be: one of the first three, which are vLLM's. See docs/guided.md."""

    choice: list[str] | None = key(None, "the text is one of these")
    regex: str | None = key(None, "the text is what Python's re.fullmatch accepts")
    json: Any = key(None, "the text fits this JSON Schema, a mapping or its text")
    score_choices: bool = key(False, "score the choices in the prefill and decode nothing; at most 256 choices")
    token_probabilities: bool = key(False, "add a column guided_logprobs: of each token among those that were allowed")


@dataclass
class SamplingConfig:
    """How tokens are chosen. A row's own `sampling` column overrides any of these for that row.

    Reals are used as float32 and checked as such: 1e-46 would be 0 there, and is refused.
    """

    max_tokens: int = key(1024, "of an answer, at most")
    min_tokens: int = key(0, "before an answer may end")
    temperature: float = key(1.0, "0: greedy")
    top_p: float = key(1.0, "of the likeliest tokens, those that make up this probability")
    top_k: int = key(0, "of the likeliest tokens, so many; 0 or -1: all")
    min_p: float = key(0.0, "tokens of at least this share of the likeliest one's probability")
    repetition_penalty: float = key(1.0, "of tokens in prompt and answer, 1e-6 to 1e6; 1: none")
    presence_penalty: float = key(0.0, "of tokens in the answer, -2 to 2")
    frequency_penalty: float = key(0.0, "of tokens in the answer, for each time, -2 to 2")
    logit_bias: dict[int, float] | None = key(None, "token id -> added to its logit, at most 1e30 either way")
    allowed_token_ids: list[int] | None = key(None, "no others are chosen; null: all may be")
    stop: list[str] | None = key(None, "texts that end an answer, at most 1,024 bytes in all")
    stop_token_ids: list[int] | None = key(None, "tokens that end an answer beside the model's own, at most 1,024")
    include_stop_str_in_output: bool = key(False, "keep the stop text that ended an answer")
    skip_special_tokens: bool = key(True, "leave control tokens out of the text")
    seed: int = key(0, "with a row's number it gives that row's random numbers")
    n: int = key(1, "samples per row, at most 10,000")
    logprobs: int | None = key(None, "this many alternatives per token beside the chosen one, at most 100")
    ignore_eos: bool = key(False, "go on after the model's end token")
    structured_outputs: StructuredOutputs | None = key(None, "guided decoding: what the text may be; null: any text")
