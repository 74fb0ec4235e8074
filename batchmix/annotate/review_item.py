"""A row for a person to check, and how its values are shown to people and read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchmix.annotate.arrow_types import Field
from batchmix.annotate.corrections import check_value
from batchmix.errors import BatchmixError


@dataclass(frozen=True)
class ReviewItem:
    """`values` are the model's, without those that it does not give."""

    row: int
    id: str
    prompt: str
    answer: str
    certainty: float
    values: dict[str, Any]


def labels_of(field: Field) -> list[str] | None:
    """What a person chooses from; None where they write."""
    if field.labels is not None:
        return list(field.labels)
    return ["true", "false"] if field.type == pa.bool_() else None


def to_text(field: Field, value: Any) -> str:
    """The value as a person reads and edits it: texts as they are, JSON of everything else."""
    return value if field.type == pa.string() or field.labels is not None else json.dumps(value, ensure_ascii=False)


def from_text(field: Field, text: str, where: str) -> Any:
    """The value that a person means; BatchmixError where the field cannot hold it."""
    if field.labels is not None or (field.type == pa.string() and not field.as_json):
        return check_value(field, text, where)
    try:
        value = json.loads(text)
    except ValueError:
        raise BatchmixError(f"{where}: {field.name}={text!r} is no JSON of {field.type}") from None
    return check_value(field, value, where)
