"""Column types of data that states none, and rows checked against them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from batchmix.records import Row

_log = logging.getLogger(__name__)
# What pyarrow raises for a value that is not of the type asked for; lone surrogates cannot be encoded.
_MISFIT = (
    pa.ArrowInvalid,
    pa.ArrowTypeError,
    pa.ArrowNotImplementedError,
    OverflowError,
    UnicodeEncodeError,
    TypeError,
)
LOOSE = {b"batchmix": b"json"}  # metadata of a string column whose values may be anything, kept as JSON text


def infer_schema(records: Iterable[dict[str, Any]]) -> pa.Schema:
    """The type of each column over a sample, columns in order of appearance.

    A column that is null throughout, or whose values have no common type, becomes a string column of JSON text.
    """
    columns: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.items():
            columns.setdefault(name, []).append(value)
    return pa.schema([_infer_field(name, values) for name, values in columns.items()])


def _infer_field(name: str, values: list[Any]) -> pa.Field:
    try:
        found = pa.infer_type(values)
        pa.array(values, found)
    except _MISFIT:
        return pa.field(name, pa.string(), metadata=LOOSE)
    return pa.field(name, pa.string(), metadata=LOOSE) if _has_null(found) else pa.field(name, found)


def _has_null(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or any(_has_null(kind.field(i).type) for i in range(kind.num_fields))


def as_json_text(value: Any) -> str | None:
    """What a column of JSON text holds for a value: strings as they are."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class Conformer:
    """Checks rows against a schema, a chunk at a time."""

    def __init__(self, schema: pa.Schema, known: list[str]) -> None:
        self.schema = schema
        self._known = set(known)
        self._strict = [field for field in schema if field.metadata != LOOSE]
        self._loose = [field.name for field in schema if field.metadata == LOOSE]

    def check(self, rows: list[Row]) -> None:
        """Rows with a value that does not fit its column become error rows, and the value becomes None."""
        for field in self._strict:
            try:
                pa.array([row.columns.get(field.name) for row in rows], field.type)
            except _MISFIT:
                for row in rows:
                    self._check_value(row, field)
        for name in self._loose:
            for row in rows:
                value = row.columns.get(name)
                if value is not None:
                    self._check_text(row, name, value)
        unknown = {name for row in rows for name in row.columns.keys() - self._known}
        if unknown:
            _log.warning(
                "columns first seen after the sample are left out of the output: %s", ", ".join(sorted(unknown))
            )
            self._known |= unknown

    @staticmethod
    def _check_value(row: Row, field: pa.Field) -> None:
        value = row.columns.get(field.name)
        try:
            pa.array([value], field.type)
        except _MISFIT:
            row.columns[field.name] = None
            row.error = row.error or f"column {field.name!r} holds {_short(value)}, which is no {field.type}"

    @staticmethod
    def _check_text(row: Row, name: str, value: Any) -> None:
        try:
            (as_json_text(value) or "").encode()
        except (UnicodeEncodeError, TypeError, ValueError):
            row.columns[name] = None
            row.error = row.error or f"column {name!r} holds {_short(value)}, which is no text"


def _short(value: Any) -> str:
    text = repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."
