"""OpenAI batch files: a line of requests in, as a row; a line of responses out, from a row's completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from batchmix.data.formats import BadRecord
from batchmix.data.schema import LOOSE
from batchmix.records import Row

OPENAI_SCHEMA = pa.schema(
    [
        pa.field("custom_id", pa.string()),
        pa.field("model", pa.string(), metadata=LOOSE),
        pa.field("messages", pa.string(), metadata=LOOSE),
    ]
)
_URLS = ("/v1/chat/completions", "/v1/completions")
_SAMPLING = {"max_tokens": "max_tokens", "max_completion_tokens": "max_tokens", "temperature": "temperature",
             "top_p": "top_p", "n": "n", "seed": "seed", "stop": "stop", "presence_penalty": "presence_penalty",
             "frequency_penalty": "frequency_penalty", "logit_bias": "logit_bias", "top_k": "top_k", "min_p": "min_p",
             "repetition_penalty": "repetition_penalty", "min_tokens": "min_tokens",
             "stop_token_ids": "stop_token_ids", "ignore_eos": "ignore_eos"}  # fmt: skip
_PROMPT = {"messages", "prompt", "model", "logprobs", "top_logprobs"}
_NO_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_HARMLESS = {"stream": (False, None), "response_format": ({"type": "text"}, None), "tools": ([], None),
             "tool_choice": ("none", "auto", None), "echo": (False, None), "suffix": (None,), "best_of": (1, None)}  # fmt: skip


def is_request(record: dict[str, Any] | BadRecord) -> bool:
    """Whether a JSON line is a request of an OpenAI batch file."""
    return isinstance(record, dict) and "custom_id" in record and "body" in record


def read_request(number: int, record: Mapping[str, Any]) -> Row:
    """One request as a row: columns custom_id, model, messages, and its sampling overrides under our names."""
    body = record.get("body")
    custom_id = record.get("custom_id")
    row = Row(number, str(number), {"custom_id": None, "model": None, "messages": None})
    if not isinstance(custom_id, str) or not custom_id:
        row.error = "the request has no custom_id"
        return row
    row.id = row.columns["custom_id"] = custom_id
    if not isinstance(body, dict):
        row.error = "the request has no body"
        return row
    row.columns["model"] = body.get("model")
    row.columns["messages"] = body.get("messages")
    if body.get("messages") is None and isinstance(body.get("prompt"), str):
        row.columns["messages"] = [{"role": "user", "content": body["prompt"]}]
    if record.get("url", _URLS[0]) not in _URLS:
        row.error = f"url {record['url']!r} is not one of {', '.join(_URLS)}"
        return row
    sampling: dict[str, Any] = {}
    for key, value in body.items():
        if key in _SAMPLING:
            sampling[_SAMPLING[key]] = value if value is not None else sampling.get(_SAMPLING[key])
        elif key in _HARMLESS:
            if value not in _HARMLESS[key]:
                row.error = f"body.{key} is not supported"
        elif key not in _PROMPT | _NO_EFFECT:
            row.error = f"body.{key} is not supported"
    logprobs = body.get("logprobs")
    if logprobs is True:
        sampling["logprobs"] = body.get("top_logprobs") or 0
    elif type(logprobs) is int:  # /v1/completions: the number of alternatives itself
        sampling["logprobs"] = logprobs
    row.sampling = sampling
    return row
