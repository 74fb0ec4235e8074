"""Log-probabilities as the output has them: of each token its text, its bytes and its rank, as OpenAI and vLLM give them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import pyarrow as pa

from batchmix.prompts.tokenizer import Tokenizer
from batchmix.records import TokenLogprob

_TOKEN = [("token", pa.string()), ("bytes", pa.list_(pa.uint8())), ("token_id", pa.int32()), ("logprob", pa.float32())]
LOGPROBS = pa.field(
    "logprobs", pa.list_(pa.struct([*_TOKEN, ("rank", pa.int32()), ("top", pa.list_(pa.struct(_TOKEN)))]))
)
_NUMBERS = [("token_id", pa.int32()), ("logprob", pa.float32())]
LOGPROBS_OF_IDS = pa.field("logprobs", pa.list_(pa.struct([*_NUMBERS, ("top", pa.list_(pa.struct(_NUMBERS)))])))
"""The column of releases that gave token ids alone."""


class TokenTexts:
    """What tokens are as text. A text of half a character has a replacement character, its bytes say which half."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._named = lru_cache(1 << 16)(self._name)

    @cached_property
    def _pieces(self) -> Sequence[bytes]:
        return self._tokenizer.token_bytes(skip_special_tokens=False) if self._tokenizer is not None else ()

    def _name(self, token_id: int) -> tuple[str | None, list[int] | None]:
        """Its text and bytes; None where the tokenizer has no such token."""
        if token_id >= len(self._pieces):
            return None, None
        return self._pieces[token_id].decode(errors="replace"), list(self._pieces[token_id])

    def records(self, entries: Sequence[TokenLogprob] | None) -> list[dict[str, Any]] | None:
        """Values of the column LOGPROBS."""
        if entries is None:
            return None
        return [
            self._record(entry.token_id, entry.logprob)
            | {"rank": entry.rank, "top": [self._record(token, logprob) for token, logprob in entry.top]}
            for entry in entries
        ]

    def _record(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, data = self._named(token_id)
        return {"token": text, "bytes": data, "token_id": token_id, "logprob": logprob}

    def openai(self, entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """`logprobs.content` of an OpenAI choice."""
        return [
            self._openai(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._openai(token, logprob) for token, logprob in entry.top]}
            for entry in entries
        ]

    def _openai(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, data = self._named(token_id)
        return {"token": f"token_id:{token_id}" if text is None else text, "logprob": logprob, "bytes": data}


def records_of_ids(entries: Sequence[TokenLogprob] | None) -> list[dict[str, Any]] | None:
    """Values of the column LOGPROBS_OF_IDS."""
    if entries is None:
        return None
    return [
        {"token_id": entry.token_id, "logprob": entry.logprob,
         "top": [{"token_id": token, "logprob": logprob} for token, logprob in entry.top]}
        for entry in entries
    ]  # fmt: skip
