"""JSON strings as patterns: any text, what matches a regex, and the formats of JSON Schema.

A character is written as itself, or as the short escape that JSON has for it; there are no \\u escapes, so control
characters without a short escape cannot be written.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from batchmix.structured_output.pattern import (
    NEVER,
    Alt,
    Chars,
    Pattern,
    Repeat,
    Seq,
    Unsupported,
    alt,
    chars,
    complement,
    intersection,
    literal,
    repeat,
    seq,
)
from batchmix.structured_output.regex import regex_pattern, searched_pattern

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_PLAIN = complement([(0, 0x1F), (ord('"'), ord('"')), (ord("\\"), ord("\\"))])
_DAY = r"([1-9]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8])))"
_TIME = r"(([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d))"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_FORMATS = {
    "date": f"(?a){_DAY}",
    "time": f"(?a){_TIME}",
    "date-time": f"(?a){_DAY}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"(?a){_BYTE}(\.{_BYTE}){{3}}",
    "email": r"[a-z0-9_+-]{1,20}(\.[a-z0-9_+-]{1,20}){0,2}@[a-z0-9]{1,20}(\.[a-z0-9]{1,20}){1,3}",
}


def any_string(low: int, high: int | None) -> Pattern:
    """A JSON string of `low` to `high` characters (None: any number)."""
    return _quoted(repeat(_character(), low, high))


def pattern_string(regex: Any) -> Pattern:
    """A JSON string in whose text the regex is found, as JSON Schema's `pattern` asks."""
    if not isinstance(regex, str):
        raise Unsupported(f"has the pattern {regex!r}, which is no text")
    try:
        return _quoted(_encoded(searched_pattern(regex)))
    except Unsupported as error:
        raise Unsupported(f"has the pattern {error}") from None


def format_string(name: Any) -> Pattern:
    """A JSON string of a format; years have four digits, and addresses no rare characters."""
    if not isinstance(name, str) or name not in _FORMATS:
        raise Unsupported(f"has the format {name!r}; supported are {', '.join(sorted(_FORMATS))}")
    return _quoted(_encoded(regex_pattern(_FORMATS[name])))


def _quoted(text: Pattern) -> Pattern:
    return seq([literal('"'), text, literal('"')])


@cache
def _character() -> Pattern:
    """One character of a string as JSON writes it."""
    return _encoded(chars([(0, sys.maxunicode)]))


def _encoded(pattern: Pattern) -> Pattern:
    """The same texts as they stand in a JSON string."""
    if isinstance(pattern, Chars):
        escaped = [
            literal(escape)
            for char, escape in _ESCAPES.items()
            if any(low <= ord(char) <= high for low, high in pattern.ranges)
        ]
        plain = chars(intersection(pattern.ranges, _PLAIN))
        return alt([part for part in (plain, *escaped) if part != NEVER])
    if isinstance(pattern, Seq):
        return seq(map(_encoded, pattern.items))
    if isinstance(pattern, Alt):
        return alt([part for part in map(_encoded, pattern.items) if part != NEVER])
    assert isinstance(pattern, Repeat)
    return repeat(_encoded(pattern.item), pattern.low, pattern.high)
