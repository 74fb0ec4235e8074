"""JSON strings as patterns: any text, what matches regexes, formats and lengths at once.

A character is written as itself, or as the short escape that JSON has for it; there are no \\u escapes, so control
characters without a short escape cannot be written.
"""

from __future__ import annotations

import sys
from functools import cache, lru_cache

from batchmix.structured_output.dfa import both
from batchmix.structured_output.ecma_regex import found_pattern
from batchmix.structured_output.formats import FORMATS
from batchmix.structured_output.pattern import (
    NEVER,
    Alt,
    Both,
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

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_PLAIN = complement([(0, 0x1F), (ord('"'), ord('"')), (ord("\\"), ord("\\"))])


@lru_cache(maxsize=1024)
def any_string(low: int = 0, high: int | None = None) -> Pattern:
    """A JSON string of `low` to `high` characters (None: any number)."""
    return quoted(_text(low, high))


@lru_cache(maxsize=1024)
def string_of(
    low: int,
    high: int | None,
    regexes: tuple[str, ...],
    formats: tuple[str, ...],
    other_than: tuple[str, ...] = (),
    unlike: tuple[str, ...] = (),
) -> Pattern:
    """A JSON string that keeps all of these limits, in which no regex of `unlike` is found; NEVER where there is none.

    Unsupported for a regex that no automaton can do; formats that are not known are none.
    """
    parts = [_found(regex) for regex in dict.fromkeys(regexes)]
    parts += [_whole(FORMATS[name]) for name in dict.fromkeys(formats) if name in FORMATS]
    if low or high is not None or not parts:
        parts.append(_text(low, high))
    without = [alt(_encoded(literal(text)) for text in other_than), *map(_found, unlike)]
    return quoted(both(parts, without))


def quoted(text: Pattern) -> Pattern:
    """The text between quotation marks."""
    return seq([literal('"'), text, literal('"')])


def _text(low: int, high: int | None) -> Pattern:
    return repeat(_character(), low, high)


@lru_cache(maxsize=512)
def _found(regex: str) -> Pattern:
    try:
        return _encoded(found_pattern(regex))
    except Unsupported as error:
        raise type(error)(f"has the pattern {error}") from None


@cache
def _whole(regex: str) -> Pattern:
    return _encoded(found_pattern(f"^(?:{regex})$"))


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
    if isinstance(pattern, Both):
        return both(map(_encoded, pattern.items), map(_encoded, pattern.without))
    assert isinstance(pattern, Repeat)
    return repeat(_encoded(pattern.item), pattern.low, pattern.high)
