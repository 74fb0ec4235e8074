"""What a JSON Schema's keywords hold: bounds, counts and constants, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from batchmix.structured_output.pattern import Unsupported

TYPE_OF: dict[type, str] = {
    bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", list: "array", dict: "object",
}  # fmt: skip


def bounds(schema: Mapping[str, Any], path: str) -> tuple[Decimal | None, bool, Decimal | None, bool]:
    """The lower bound, whether it is exclusive, and the upper one likewise."""
    values: dict[str, Decimal] = {}
    for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        if key in schema:
            value = schema[key]
            finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
            if isinstance(value, bool) or not finite:
                raise refusal(f"{path}/{key}", f"must be a number, not {value!r}")
            values[key] = Decimal(repr(value))
    low, open_low = max(
        [(values[key], key == "exclusiveMinimum") for key in ("minimum", "exclusiveMinimum") if key in values],
        default=(None, False),
    )
    high, closed = min(
        [(values[key], key == "maximum") for key in ("maximum", "exclusiveMaximum") if key in values],
        default=(None, True),
    )
    return low, open_low, high, not closed


def count(schema: Mapping[str, Any], key: str, path: str, default: int | None) -> int | None:
    """A length or a number of items."""
    value = schema.get(key, default)
    if value is not default and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise refusal(f"{path}/{key}", f"must be a count, not {value!r}")
    return value


def has_type(value: Any, types: Any, whole_is_integer: bool = True) -> bool:
    """Whether a constant is of the schema's type, where that gives one. `whole_is_integer`: 1.0 is, as 1 is."""
    if types is None:
        return True
    names = types if isinstance(types, list) else [types]
    own = TYPE_OF.get(type(value), "")
    whole = whole_is_integer and own == "number" and float(value).is_integer()
    return own in names or (own == "integer" and "number" in names) or (whole and "integer" in names)


def kind_of(name: str) -> str:
    """The type that tells values apart: an integer is a number."""
    return "number" if name == "integer" else name


def normal(value: Any) -> str:
    """The same text for values that JSON Schema takes for equal: 1 and 1.0 are, also within lists and objects."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return {"number": str(Fraction(value))}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {"object": {key: _plain(item) for key, item in value.items()}}
    return value


def dumps(value: Any, path: str) -> str:
    """A constant as it is written."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError):  # of lone surrogates too
        raise refusal(path, f"has {value!r}, which is no JSON value in Unicode") from None
    return text


def refusal(path: str, reason: str) -> Unsupported:
    """What is wrong with the part of a schema that stands at `path`."""
    return Unsupported(f"{path or 'the schema'} {reason}")
