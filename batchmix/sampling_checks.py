"""Whether the values of `sampling`, a job's or a row's own, make sense.

Hydra and the dataclass have refused unknown keys and wrong types of a command line by then; those of a row come from data,
so `override_sampling` refuses them too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from batchmix.other_names import explain_other_name
from batchmix.sampling import MAX_SCORED_CHOICES, SamplingConfig, StructuredOutputs

_MANY = 2**31 - 1  # counts of tokens are 32-bit integers in the output
_RANGES: dict[str, tuple[float, float, bool]] = {
    # key: (low, high, low itself is allowed)
    "max_tokens": (1, _MANY, True),
    "min_tokens": (0, _MANY, True),
    "temperature": (0, math.inf, True),
    "top_p": (0, 1, False),
    "top_k": (-1, _MANY, True),
    "min_p": (0, 1, True),
    "repetition_penalty": (1e-6, 1e6, True),  # with the largest bias below, logits stay finite
    "presence_penalty": (-2, 2, True),
    "frequency_penalty": (-2, 2, True),
    "n": (1, 10_000, True),  # a row is committed with all its samples, which wait for each other in memory
    "logprobs": (0, 100, True),  # 0.8 GiB on the host for 256 rows of 4,096 tokens
    "seed": (-(2**63), 2**63 - 1, True),
}
# The device has reals as float32. Below the first, numbers lose their bits one by one, and some devices take them for 0.
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_MAX_BIAS = 1e30  # a logit of this size, less any other, over any penalty, is still one that float32 holds
_MAX_STOP_TOKENS = 1024  # of a row: steps compare with each
_MAX_STOP_BYTES = 1024  # of a row's stop strings: each takes a state of an automaton, 8 bytes for every token there is
_BOOLS = {"include_stop_str_in_output", "skip_special_tokens", "ignore_eos"}
_INTS = {"max_tokens", "min_tokens", "top_k", "n", "logprobs", "seed"}
_SAMPLING_KEYS = {f.name: f for f in dataclasses.fields(SamplingConfig)}


def check_sampling(sampling: SamplingConfig) -> SamplingConfig:
    """Return `sampling` if every value is in range; ValueError with one line naming the key otherwise."""
    for key, (low, high, closed) in _RANGES.items():
        value = getattr(sampling, key)
        if value is None:
            continue
        if value in (math.inf, -math.inf) or value != value:
            raise ValueError(f"sampling.{key}={value} is no number")
        if not (low <= value <= high and (closed or value > low)):
            raise ValueError(
                f"sampling.{key}={reprlib.repr(value)} must be {'at least' if closed else 'above'} {low}"
                + (f" and at most {high}" if high < math.inf else "")
            )
        if key not in _INTS and not _fits_float32(value):
            raise ValueError(
                f"sampling.{key}={value} is no number of float32, as which it is used: 0, or from {_SMALLEST:.2g} to"
                f" {_LARGEST:.2g} without its sign"
            )
    if sampling.min_tokens > sampling.max_tokens:
        raise ValueError(f"sampling.min_tokens={sampling.min_tokens} is above max_tokens={sampling.max_tokens}")
    if sampling.allowed_token_ids is not None and not sampling.allowed_token_ids:
        raise ValueError("sampling.allowed_token_ids is empty: no token could be chosen")
    if any(not text for text in sampling.stop or ()):
        raise ValueError("sampling.stop has an empty string, which would stop every row at once")
    try:
        size = sum(len(text.encode()) for text in sampling.stop or ())
    except UnicodeEncodeError:
        raise ValueError("sampling.stop has a text that is not valid Unicode") from None
    if size > _MAX_STOP_BYTES:
        raise ValueError(f"sampling.stop has {size} bytes in all; at most {_MAX_STOP_BYTES} can be searched for")
    for token, bias in (sampling.logit_bias or {}).items():
        if not math.isfinite(bias):
            raise ValueError(f"sampling.logit_bias has {bias} for token {token}, which is no number; -100 bans a token")
        if abs(bias) > _MAX_BIAS:
            raise ValueError(
                f"sampling.logit_bias has {bias} for token {token}; at most {_MAX_BIAS:.0e} either way, and -100 bans a token"
            )
    if len(set(sampling.stop_token_ids or ())) > _MAX_STOP_TOKENS:
        raise ValueError(f"sampling.stop_token_ids has more than {_MAX_STOP_TOKENS:,} tokens")
    if sampling.structured_outputs is not None:
        _check_structured(sampling.structured_outputs, sampling)
    return sampling


def _fits_float32(value: float) -> bool:
    """Whether float32 has the value, but for rounding; without this, 1e-46 would be 0 there and 1e39 infinite."""
    return value == 0 or _SMALLEST <= abs(value) <= _LARGEST


def _check_structured(outputs: StructuredOutputs, sampling: SamplingConfig) -> None:
    """ValueError where the values are of the wrong kind; what a regex or a schema says is checked by `guided`."""
    key = "sampling.structured_outputs"
    given = [name for name in ("choice", "regex", "json") if getattr(outputs, name) is not None]
    if len(given) != 1:
        raise ValueError(f"{key} has {' and '.join(given) or 'nothing'}; give one of choice, regex and json")
    choice = outputs.choice
    if choice is not None:
        if not isinstance(choice, list | tuple) or not all(isinstance(text, str) and text for text in choice):
            raise ValueError(f"{key}.choice must be a list of texts that are not empty")
        if len(set(choice)) < max(len(choice), 1):
            raise ValueError(f"{key}.choice {'has a text twice' if choice else 'is empty: nothing could be chosen'}")
    if not isinstance(outputs.regex or "", str):
        raise ValueError(f"{key}.regex={reprlib.repr(outputs.regex)} must be a text")
    if any("\ud800" <= char <= "\udfff" for text in [*(choice or ()), outputs.regex or ""] for char in text):
        raise ValueError(f"{key} has a text that is not valid Unicode")
    if outputs.json is not None and not isinstance(outputs.json, str | Mapping):
        raise ValueError(f"{key}.json={reprlib.repr(outputs.json)} must be a JSON Schema, a mapping or its text")
    try:
        json.dumps(outputs.json)
    except (TypeError, ValueError) as error:  # a column of structs may hold times or bytes
        raise ValueError(f"{key}.json={reprlib.repr(outputs.json)} is no JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{key}.json is nested too deeply") from None
    if sampling.stop:
        raise ValueError(f"sampling.stop does not go with {key}, which says itself where the text ends")
    for flag in ("score_choices", "token_probabilities"):
        if not isinstance(getattr(outputs, flag), bool):
            raise ValueError(f"{key}.{flag}={reprlib.repr(getattr(outputs, flag))} must be true or false")
    if outputs.token_probabilities and (outputs.score_choices or sampling.logprobs is not None):
        other = f"{key}.score_choices" if outputs.score_choices else "sampling.logprobs"
        raise ValueError(f"{other} does not go with {key}.token_probabilities; leave one of the two out")
    if outputs.score_choices:
        if choice is None or len(choice) > MAX_SCORED_CHOICES:
            raise ValueError(f"{key}.score_choices needs {key}.choice, of at most {MAX_SCORED_CHOICES} texts")
        if sampling.logprobs is not None:
            raise ValueError(f"sampling.logprobs does not go with {key}.score_choices, which decodes no tokens")


def override_sampling(base: SamplingConfig, overrides: Mapping[str, Any]) -> SamplingConfig:
    """`base` with a row's own values, which come from data and so may be anything.

    None means "not given". ValueError with one line where a key is unknown or a value is of the wrong type.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    unknown = sorted(set(given) - set(_SAMPLING_KEYS))
    if unknown:
        other = explain_other_name(str(unknown[0]))
        raise ValueError(f"sampling has no key {reprlib.repr(unknown[0])}" + (f"; {other}" if other else ""))
    for key, value in given.items():
        given[key] = _coerce(key, value)
    outputs = base.structured_outputs
    if "logprobs" in given and outputs is not None and outputs.token_probabilities:
        # A task asks for these, for its confidence, and such a row has that of its text.
        given.setdefault("structured_outputs", dataclasses.replace(outputs, token_probabilities=False))
    return check_sampling(dataclasses.replace(base, **given))


def _coerce(key: str, value: Any) -> Any:
    wrong = ValueError(f"sampling.{key}={reprlib.repr(value)} is of the wrong type")
    if key in _BOOLS:
        if not isinstance(value, bool):
            raise wrong
    elif key == "stop":
        value = [value] if isinstance(value, str) else value
        if not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            raise wrong
    elif key == "structured_outputs":
        if not isinstance(value, Mapping):
            raise wrong
        given = {name: item for name, item in value.items() if item is not None}
        if unknown := sorted(given.keys() - {f.name for f in dataclasses.fields(StructuredOutputs)}):
            raise ValueError(f"sampling.structured_outputs has no key {reprlib.repr(unknown[0])}")
        value = StructuredOutputs(**given)
    elif key in ("stop_token_ids", "allowed_token_ids"):
        if not (isinstance(value, list) and all(type(token) is int for token in value)):
            raise wrong
    elif key == "logit_bias":
        try:  # a column of objects has the keys of all rows, null where a row has none; one of maps has pairs
            value = {int(token): float(bias) for token, bias in dict(value).items() if bias is not None}
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong
    else:
        try:
            number = int(value) if key in _INTS else float(value)
        except (ValueError, OverflowError):  # not a number, infinity, more than a float holds
            raise wrong from None
        if key in _INTS and number != value:
            raise wrong
        value = number
    return value
