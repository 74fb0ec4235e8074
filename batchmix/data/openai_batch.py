"""The request lines of OpenAI batch files, as rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from batchmix.data.schema import LOOSE, is_unicode, short
from batchmix.records import Row

OPENAI_SCHEMA = pa.schema(
    [
        pa.field("custom_id", pa.string()),
        pa.field("model", pa.string(), metadata=LOOSE),
        pa.field("messages", pa.string(), metadata=LOOSE),
        pa.field("prompt", pa.string()),
    ]
)
_URLS = _CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_SAMPLING = {"max_tokens": "max_tokens", "max_completion_tokens": "max_tokens", "temperature": "temperature",
             "top_p": "top_p", "n": "n", "seed": "seed", "stop": "stop", "presence_penalty": "presence_penalty",
             "frequency_penalty": "frequency_penalty", "logit_bias": "logit_bias", "top_k": "top_k", "min_p": "min_p",
             "repetition_penalty": "repetition_penalty", "min_tokens": "min_tokens",
             "stop_token_ids": "stop_token_ids", "ignore_eos": "ignore_eos"}  # fmt: skip
_NO_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_KNOWN = {"messages", "prompt", "model", "logprobs", "top_logprobs", *_NO_EFFECT, *_SAMPLING}
_HARMLESS = {"stream": (False, None), "response_format": ({"type": "text"}, None), "tools": ([], None),
             "tool_choice": ("none", "auto", None), "echo": (False, None), "suffix": (None,), "best_of": (1, None)}  # fmt: skip


def is_request(record: Mapping[str, Any]) -> bool:
    """Whether a JSON line is a request of an OpenAI batch file."""
    return "custom_id" in record and "body" in record


def read_request(number: int, record: Mapping[str, Any]) -> Row:
    """One request as a row: columns custom_id, model, messages or prompt, and its sampling overrides under our names."""
    row = Row(number, str(number), dict.fromkeys(OPENAI_SCHEMA.names))
    row.error = _read(row, record)
    return row


def _read(row: Row, record: Mapping[str, Any]) -> str | None:
    """Fill the row; what is wrong with the request, or None."""
    custom_id, body = record.get("custom_id"), record.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        return f"custom_id must be a text, not {short(custom_id)}"
    if not is_unicode(custom_id):
        return f"custom_id {short(custom_id)} is no text: it has half a surrogate pair"
    row.id = row.columns["custom_id"] = custom_id
    if not isinstance(body, dict):
        return f"body must be an object, not {short(body)}"
    row.columns["model"] = body.get("model")
    row.columns["messages"] = body.get("messages")
    url, prompt = record.get("url"), body.get("prompt")
    if url is not None and url not in _URLS:
        return f"url {short(url)} is not one of {', '.join(_URLS)}"
    if body.get("messages") is None:
        if not isinstance(prompt, str):
            return "body.messages is missing" if prompt is None else f"body.prompt must be a text, not {short(prompt)}"
        if url == _CHAT:
            return f"body.prompt is for {_COMPLETIONS}; the url {_CHAT} needs body.messages"
        row.text = row.columns["prompt"] = prompt
    elif prompt is not None or url == _COMPLETIONS:
        return (
            f"body.messages is for {_CHAT}; {'body.prompt' if prompt is not None else 'the url'} is for {_COMPLETIONS}"
        )
    for key, value in body.items():
        if value not in _HARMLESS[key] if key in _HARMLESS else key not in _KNOWN:
            return f"body key {short(key)} with the value {short(value)} is not supported"
    row.sampling = _sampling(body)
    return None


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """The request's sampling under our names, None where it is not given."""
    sampling: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        if body.get(key) is not None:
            sampling[name] = body[key]
    logprobs = body.get("logprobs")
    if logprobs is True:
        sampling["logprobs"] = body.get("top_logprobs") or 0
    elif logprobs not in (False, None) or type(logprobs) is int:  # /v1/completions: the number of alternatives itself
        sampling["logprobs"] = logprobs
    return sampling
