"""`SamplingParams` with vLLM's names and defaults, for the keys that `sampling` has."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchmix.api.names import refuse, refuse_attribute
from batchmix.sampling import SamplingConfig
from batchmix.sampling_checks import override_sampling

_WHOLE_CONTEXT = 2**31 - 1  # of max_tokens=None, where no model says what it is
_FLAG = "leave it out"
_GUIDED = {
    "guided_choice": "use structured_outputs=StructuredOutputsParams(choice=[...])",
    "guided_grammar": "use structured_outputs=StructuredOutputsParams(regex=...), or json",
    "guided_json": "use structured_outputs=StructuredOutputsParams(json=...)",
    "guided_regex": "use structured_outputs=StructuredOutputsParams(regex=...)",
}
NOT_THERE = _GUIDED | {
    "bad_words": "use logit_bias={token_id: -100} for each token",
    "best_of": "use n, and pick by cumulative_logprob (logprobs=0)",
    "detokenize": "the text is always there",
    "early_stopping": "there is no beam search",
    "extra_args": "there are no plugins",
    "flat_logprobs": _FLAG,
    "guided_decoding": "use structured_outputs=StructuredOutputsParams(...)",
    "length_penalty": "there is no beam search",
    "logits_processors": "use logit_bias, allowed_token_ids or structured_outputs",
    "logprob_token_ids": "use logprobs, or StructuredOutputsParams(choice=[...], score_choices=True) to compare labels",
    "output_kind": "an output comes once, when it is whole",
    "prompt_logprob_start": "log-probabilities of prompts are not computed",
    "prompt_logprob_token_ids": "log-probabilities of prompts are not computed",
    "prompt_logprobs": "log-probabilities of prompts are not computed; score_choices scores given answers",
    "repetition_detection": "use max_tokens, and frequency_penalty or repetition_penalty",
    "routed_experts_prompt_start": "routing is not returned; summary.json of a job counts tokens by expert",
    "skip_clone": _FLAG,
    "skip_reading_prefix_cache": _FLAG,
    "spaces_between_special_tokens": "special tokens are written as they are",
    "stream_interval": "an output comes once, when it is whole",
    "thinking_token_budget": "use max_tokens",
    "trace_decode_token_ids": "use structured_outputs to force a text",
    "truncate_prompt_tokens": "cut the token ids yourself; a prompt that is too long comes back with an error",
    "use_beam_search": "sample with n and pick by cumulative_logprob (logprobs=0)",
}
"""vLLM's names that are not there, and what to use."""
_PASSING: dict[str, Any] = {"detokenize": True, "spaces_between_special_tokens": True, "best_of": 1}  # vLLM's defaults
STRUCTURED_NOT_THERE = {
    "grammar": "write it as a regex or a JSON Schema",
    "structural_tag": "write it as a regex or a JSON Schema",
    "whitespace_pattern": "white space in JSON is as docs/guided.md says",
    "disable_any_whitespace": "white space in JSON is as docs/guided.md says",
    "disable_additional_properties": "write additionalProperties: false into the schema",
    "backend": "there is one backend",
}


class _KnownAttributes:
    """A dataclass to whose objects nothing is added by a typo."""

    _not_there: typing.ClassVar[Mapping[str, str]]  # vLLM's names, with what to use

    if not typing.TYPE_CHECKING:  # with it, type checkers would let every name pass

        def __setattr__(self, name: str, value: Any) -> None:
            """AttributeError for a name that is not there."""
            refuse_attribute(type(self).__name__, name, self._not_there, self.__dataclass_fields__)
            object.__setattr__(self, name, value)


@dataclass(init=False)
class StructuredOutputsParams(_KnownAttributes):
    """What the text may be: exactly one of json, regex, choice and json_object. The last two flags are batchmix's own.

    `json`: a JSON Schema, its text, or a pydantic class.
    """

    _not_there = STRUCTURED_NOT_THERE
    json: str | Mapping[str, Any] | type | None
    regex: str | None
    choice: Sequence[str] | None
    json_object: bool | None
    score_choices: bool
    token_probabilities: bool

    def __init__(
        self,
        json: str | Mapping[str, Any] | type | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        *,
        json_object: bool | None = None,
        score_choices: bool = False,
        token_probabilities: bool = False,
        **others: Any,
    ) -> None:
        refuse("StructuredOutputsParams", others, STRUCTURED_NOT_THERE, [f.name for f in dataclasses.fields(self)])
        self.json, self.regex, self.choice, self.json_object = json, regex, choice, json_object
        self.score_choices, self.token_probabilities = score_choices, token_probabilities
        self.overrides()

    def overrides(self) -> dict[str, Any]:
        """The keys of `sampling.structured_outputs`. ValueError where not exactly one says what the text may be."""
        given = [
            name for name in ("json", "regex", "choice", "json_object") if getattr(self, name) not in (None, False)
        ]
        if len(given) != 1:
            raise ValueError(f"StructuredOutputsParams has {' and '.join(given) or 'nothing'}; give one of json, regex,"
                             " choice and json_object")  # fmt: skip
        values = {name: getattr(self, name) for name in ("json", "regex", "score_choices", "token_probabilities")}
        if isinstance(self.json, type):
            values["json"] = _schema_of(self.json)
        if self.json_object:
            values["json"] = {"type": "object"}
        if self.choice is not None:
            values["choice"] = self.choice if isinstance(self.choice, str) else list(self.choice)
        return {name: value for name, value in values.items() if value is not None and value is not False}


def _schema_of(cls: type) -> Any:
    """The JSON Schema of a pydantic class. ValueError for another class."""
    if not hasattr(cls, "model_json_schema"):
        raise ValueError(f"structured_outputs.json={cls.__name__} is no pydantic class; give a JSON Schema")
    return cls.model_json_schema()


@dataclass(init=False)
class SamplingParams(_KnownAttributes):
    """How tokens are chosen. Names, order and defaults are vLLM's.

    ValueError for a value that no model can work with, TypeError for a name of vLLM's that is not there.
    """

    _not_there = NOT_THERE
    n: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    max_tokens: int | None
    min_tokens: int
    logprobs: int | None
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    structured_outputs: StructuredOutputsParams | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None

    def __init__(
        self,
        n: int = 1,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        logprobs: int | None = None,
        *,
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        structured_outputs: Any = None,
        logit_bias: Mapping[int, float] | None = None,
        allowed_token_ids: Sequence[int] | None = None,
        **others: Any,
    ) -> None:
        """`max_tokens`: None for the rest of the context. `seed`: None or -1 for another one in each call."""
        others = {name: value for name, value in others.items() if name not in _PASSING or value != _PASSING[name]}
        for name, remedy in _GUIDED.items():
            if others.get(name) is not None:  # {} asks for something: it is a schema
                raise TypeError(f"SamplingParams: {name} is not there; {remedy}")
        refuse("SamplingParams", others, NOT_THERE, [f.name for f in dataclasses.fields(self)])
        self.n, self.seed = n, None if seed == -1 else seed
        self.presence_penalty, self.frequency_penalty = presence_penalty, frequency_penalty
        self.repetition_penalty = repetition_penalty
        self.temperature, self.top_p, self.top_k, self.min_p = temperature, top_p, top_k, min_p
        self.stop, self.stop_token_ids, self.ignore_eos = stop, stop_token_ids, ignore_eos
        self.max_tokens, self.min_tokens = max_tokens, min_tokens
        self.logprobs = 1 if logprobs is True else logprobs
        self.skip_special_tokens, self.include_stop_str_in_output = skip_special_tokens, include_stop_str_in_output
        if not isinstance(structured_outputs, StructuredOutputsParams | None):
            given = type(structured_outputs).__name__
            raise TypeError(f"SamplingParams: structured_outputs must be StructuredOutputsParams, not {given}")
        self.structured_outputs, self.logit_bias = structured_outputs, logit_bias
        self.allowed_token_ids = allowed_token_ids
        self.check()

    def check(self) -> None:
        """ValueError for a value that no model can work with."""
        try:
            override_sampling(SamplingConfig(), self.overrides(0, _WHOLE_CONTEXT))
        except ValueError as error:
            raise ValueError(python_names(str(error))) from None

    def overrides(self, seed: int, max_tokens: int) -> dict[str, Any]:
        """These as a row's overrides of `sampling`. `seed` and `max_tokens` stand for None."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["seed"] = seed if self.seed is None else self.seed
        values["max_tokens"] = max_tokens if self.max_tokens is None else self.max_tokens
        for name in ("stop", "stop_token_ids", "allowed_token_ids"):
            if values[name] is not None and not isinstance(values[name], str):
                values[name] = list(values[name])
        if self.structured_outputs is not None:
            values["structured_outputs"] = self.structured_outputs.overrides()
        return {name: value for name, value in values.items() if value not in (None, [], {})}

    def clone(self) -> SamplingParams:
        """A copy, as deep as it takes."""
        return copy.deepcopy(self)


def python_names(message: str) -> str:
    """A message about keys of `sampling`, for who has written arguments."""
    return message.replace("sampling.", "")
