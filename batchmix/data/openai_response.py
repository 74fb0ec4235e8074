"""A row's completions as one line of an OpenAI batch output file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchmix.records import Completion


def response_line(samples: Sequence[Completion], model: str) -> dict[str, Any]:
    """The response to one request; `samples` are the row's, in order. Its `id` ends in the row's ordinal.

    `created` is 0: the same rows give the same bytes whenever they run. Log-probabilities carry token ids, since the
    text of a single token is not always valid UTF-8.
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
        "choices": [_choice(sample) for sample in samples],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return line | {"response": {"status_code": 200, "request_id": name, "body": body}}


def _choice(sample: Completion) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": sample.sample_index,
        "message": {"role": "assistant", "content": sample.text},
        "logprobs": None,
        "finish_reason": sample.finish_reason,
    }
    if sample.logprobs is not None:
        choice["logprobs"] = {
            "content": [
                {
                    "token": f"token_id:{entry.token_id}",
                    "logprob": entry.logprob,
                    "top_logprobs": [
                        {"token": f"token_id:{token}", "logprob": logprob} for token, logprob in entry.top
                    ],
                }
                for entry in sample.logprobs
            ]
        }
    return choice
