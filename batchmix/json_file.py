"""JSON objects in files that somebody else wrote: configurations, indices."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from batchmix.errors import BatchmixError

MAX_BYTES = 256 << 20  # the largest that there are, a tokenizer.json, have some 30 MB

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; BatchmixError of one line where there is none.

    Stricter than json.loads: a key that is there twice, NaN and Infinity are refused, for readers differ in what they
    make of them.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BatchmixError(f"{path}: has more than {MAX_BYTES >> 20} MiB, so it is no configuration")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        raise BatchmixError(f"{path}: cannot be read as JSON ({error})") from None
    except RecursionError:
        raise BatchmixError(f"{path}: cannot be read as JSON (it is nested too deeply)") from None
    if not isinstance(value, dict):
        raise BatchmixError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def shown(value: object) -> str:
    """A value of such a file for an error message: on one line, cut where it is long or deep."""
    return _repr.repr(value)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(double)} is there twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
