"""What a JSON Schema's keywords hold: bounds and constants, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from batchmix.structured_output.pattern import Unsupported

TYPE_OF: dict[type, str] = {
    bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", list: "array", dict: "object",
}  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """Limits of a number."""

    low: Decimal | None
    open_low: bool
    high: Decimal | None
    open_high: bool

    @property
    def exclude_each_other(self) -> bool:
        """Whether no number is between them."""
        if self.low is None or self.high is None:
            return False
        return self.low > self.high or (self.low == self.high and (self.open_low or self.open_high))


def bounds(keywords: Iterable[tuple[Mapping[str, Any], str]]) -> Bounds:
    """The narrowest of all bounds; `keywords` with their paths."""
    low, open_low, high, open_high = None, False, None, False
    for words, path in keywords:
        for key, exclusive in (("minimum", False), ("exclusiveMinimum", True)):
            if key in words:
                value = decimal(words[key], f"{path}/{key}")
                if low is None or (value, exclusive) > (low, open_low):
                    low, open_low = value, exclusive
        for key, exclusive in (("maximum", False), ("exclusiveMaximum", True)):
            if key in words:
                value = decimal(words[key], f"{path}/{key}")
                if high is None or (value, not exclusive) < (high, not open_high):
                    high, open_high = value, exclusive
    return Bounds(low, open_low, high, open_high)


def decimal(value: Any, path: str) -> Decimal:
    """A number of a schema."""
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not finite:
        raise refusal(path, f"must be a number, not {value!r}")
    return Decimal(value) if isinstance(value, int) else Decimal(repr(value))


def type_of(value: Any) -> str:
    """The type of a constant, "number" for integers too."""
    name = TYPE_OF.get(type(value), "object" if isinstance(value, Mapping) else "")
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
