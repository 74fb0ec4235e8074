"""The types of a CSV file's columns, and its fields as values of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import pyarrow as pa

_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_PLAIN_INTEGER = re.compile(r"0|-?[1-9]\d*", re.ASCII)
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf)|nan", re.ASCII | re.IGNORECASE)
_BOOLS = {"true": True, "false": False}
_EXACT_FLOAT = 2**53


def infer_csv_schema(records: Iterable[dict[str, Any]], as_text: Collection[str]) -> pa.Schema:
    """The type of each column over a sample: int64, bool, float64, else string; null where all fields are empty.

    A column with a number that would not come out as it was written (leading zeros, more digits than the type holds)
    has identifiers in it and is a string. So are the columns of `as_text`.
    """
    columns: dict[str, list[str]] = {}
    for record in records:
        for name, value in record.items():
            values = columns.setdefault(name, [])
            if value is not None:
                values.append(value)
    return pa.schema([(name, pa.string() if name in as_text else _infer(values)) for name, values in columns.items()])


def _infer(values: list[str]) -> pa.DataType:
    if not values:
        return pa.null()
    if all(_INTEGER.fullmatch(value) for value in values):
        exact = all(_PLAIN_INTEGER.fullmatch(value) and -(2**63) <= int(value) < 2**63 for value in values)
        return pa.int64() if exact else pa.string()
    if all(value.lower() in _BOOLS for value in values):
        return pa.bool_()
    if all(_NUMBER.fullmatch(value) and _fits_float(value) for value in values):
        return pa.float64()
    return pa.string()


def _fits_float(value: str) -> bool:
    if not _INTEGER.fullmatch(value):
        return True
    return bool(_PLAIN_INTEGER.fullmatch(value)) and abs(int(value)) <= _EXACT_FLOAT


def parse_field(text: str, kind: pa.DataType) -> Any:
    """The field as a value of the type; as the text that it is where it does not fit."""
    field = text.strip()
    if pa.types.is_integer(kind) and _INTEGER.fullmatch(field):
        return int(field)
    if pa.types.is_floating(kind) and _NUMBER.fullmatch(field):
        return float(field)
    if pa.types.is_boolean(kind):
        return _BOOLS.get(field.lower(), text)
    return text
