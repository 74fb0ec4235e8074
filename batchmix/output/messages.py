"""Conversations as the output has them: lists of structs, whatever they came in as."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from batchmix.input import strict_json
from batchmix.input.schema import is_unicode
from batchmix.templates.messages import JOINER

MESSAGES = pa.list_(
    pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("name", pa.string()),
            ("prefix", pa.bool_()),
            ("extra", pa.string()),  # JSON text of all other keys
        ]
    )
)
_TYPES = {"role": str, "name": str, "prefix": bool}


def is_list_of_structs(kind: pa.DataType) -> bool:
    """Whether a column of messages can stay as it is."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and pa.types.is_struct(kind.value_type))


def message_records(value: Any) -> list[dict[str, Any]] | None:
    """A conversation, or the JSON text of one, as a value of MESSAGES. Nothing is lost: what is no message is the content of
    one without a role.

    >>> message_records('[{"from": "human", "value": "Hi", "weight": 1}]')
    [{'role': 'human', 'content': 'Hi', 'name': None, 'prefix': None, 'extra': '{"weight": 1}'}]
    """
    if value is None:
        return None
    given = _parsed(value) if isinstance(value, str) else value
    if not isinstance(given, list | tuple):
        return [_record({}, _text(value))]
    found = [_message(item) for item in given]
    texts = (item for message in found for item in message.values() if isinstance(item, str))
    if not all(map(is_unicode, texts)):  # JSON can state half of a surrogate pair, and Arrow cannot hold it
        return [_record({}, value if isinstance(value, str) else json.dumps(value, default=str))]
    return found


def _message(given: Any) -> dict[str, Any]:
    if isinstance(given, list) and given and all(isinstance(item, tuple) for item in given):
        given = dict(given)  # of a column of Arrow maps
    if not isinstance(given, Mapping):
        return _record({}, _text(given))
    rest = dict(given)
    sharegpt = rest.get("role") is None and rest.get("from") is not None
    if sharegpt:
        rest["role"] = rest.pop("from")
    content = _content(rest.pop("value" if sharegpt else "content", None))
    known = {key: rest.pop(key) for key, kind in _TYPES.items() if isinstance(rest.get(key), kind)}
    rest = {key: item for key, item in rest.items() if item is not None}
    if rest.keys() == {"extra"} and isinstance(rest["extra"], str):  # a record that this function has made
        return _record(known, content, rest["extra"])
    return _record(known, content, strict_json.dumps(rest, default=str) if rest else None)


def _record(known: Mapping[str, Any], content: str | None, extra: str | None = None) -> dict[str, Any]:
    return {"role": known.get("role"), "content": content, "name": known.get("name"), "prefix": known.get("prefix"),
            "extra": extra}  # fmt: skip


def _content(value: Any) -> str | None:
    """Text parts are joined as the model reads them."""
    if isinstance(value, list | tuple):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in value
        ]
        if all(isinstance(part, str) for part in parts):
            return JOINER.join(part for part in parts if part)
    return None if value is None else _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else strict_json.dumps(value, default=str)


def _parsed(text: str) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
