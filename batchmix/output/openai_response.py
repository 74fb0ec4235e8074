"""A row's completions as one line of an OpenAI batch output file, and what can be read back of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from batchmix.output.logprobs import TokenTexts
from batchmix.records import Completion

_ROW_IN_ID = re.compile(r"batch_req_(\d+)$")


def response_line(samples: Sequence[Completion], model: str, tokens: TokenTexts) -> dict[str, Any]:
    """The response to one request; `samples` are the row's, in order. Its `id` ends in the row's ordinal.

    `created` is 0: the same rows give the same bytes whenever they run.
    """
    first = samples[0]
    name = f"batch_req_{first.prompt.row}"
    line: dict[str, Any] = {"id": name, "custom_id": first.prompt.id, "response": None, "error": None}
    failed = next((sample.error for sample in samples if sample.error is not None), None)
    if failed is not None:
        return line | {"error": {"code": "invalid_request", "message": failed}}
    prompt_tokens = len(first.prompt.token_ids)
    completion_tokens = sum(sample.num_tokens for sample in samples)
    body = {
        "id": f"chatcmpl-{first.prompt.row}",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [_choice(sample, tokens) for sample in samples],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return line | {"response": {"status_code": 200, "request_id": name, "body": body}}


def response_keys(response: dict[str, Any]) -> tuple[int, str, int, int, int]:
    """Row, finish_reason, prompt tokens, completion tokens and samples. ValueError where it is none of our responses."""
    row = _row_of(response)
    if response["error"]:
        return row, "error", 0, 0, 1
    body = response["response"]["body"]
    cut = any(choice["finish_reason"] == "length" for choice in body["choices"])
    usage = body["usage"]
    return (
        row,
        "length" if cut else "stop",
        usage["prompt_tokens"],
        usage["completion_tokens"],
        len(body["choices"]),
    )


def _row_of(response: dict[str, Any]) -> int:
    match = _ROW_IN_ID.match(response["id"])
    if match is None:
        raise ValueError(f"a response has the id {response['id']!r}")
    return int(match[1])


def first_choice(response: dict[str, Any]) -> dict[str, Any]:
    """Of a row's samples the first, by the names of the columns that other runs have. ValueError as above."""
    body = (response["response"] or {}).get("body") or {}
    choice = (body.get("choices") or [{}])[0]
    usage = body.get("usage") or {}
    return {
        "row": _row_of(response),
        "id": response["custom_id"],
        "sample_index": 0,
        "generated_text": (choice.get("message") or {}).get("content"),
        "finish_reason": choice.get("finish_reason") or "error",
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "error": (response["error"] or {}).get("message"),
    }


def _choice(sample: Completion, tokens: TokenTexts) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": sample.sample_index,
        "message": {"role": "assistant", "content": sample.text},
        "logprobs": None,
        "finish_reason": sample.finish_reason,
    }
    if sample.logprobs is not None:
        choice["logprobs"] = {"content": tokens.openai(sample.logprobs)}
    return choice
