"""JSON as RFC 8259 has it, which knows no NaN and no infinity: they are null, as orjson and pandas write them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def dumps(value: Any, *, default: Callable[[Any], Any] | None = None, indent: int | None = None) -> str:
    """As `json.dumps` with ensure_ascii=False.

    >>> dumps({"score": [float("nan"), 1.0]})
    '{"score": [null, 1.0]}'
    """
    try:
        return json.dumps(value, ensure_ascii=False, default=default, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=default, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {
            key if not isinstance(key, float) or math.isfinite(key) else str(key): _finite(item)
            for key, item in value.items()
        }
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
