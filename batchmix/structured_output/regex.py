"""Python's regular expressions as patterns: the texts that `re.fullmatch` accepts.

CPython's own parser reads them (`re._parser`), so that syntax, flags and what counts as a digit or a word character are
Python's by construction. What no finite automaton over characters can do is refused by name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from re import _constants as c  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from batchmix.structured_output.pattern import (
    Pattern,
    Range,
    Unsupported,
    alt,
    chars,
    complement,
    intersection,
    repeat,
    seq,
)

_MAX_REPEAT = 100_000  # counted repetitions beyond it are no use, and cost memory before dfa.py's limit is seen
_REFUSED = {
    c.ASSERT: "look-around (?=...)",
    c.ASSERT_NOT: "look-around (?!...)",
    c.GROUPREF: "a back-reference",
    c.GROUPREF_EXISTS: "a conditional group (?(1)...)",
    c.ATOMIC_GROUP: "an atomic group (?>...)",
    c.POSSESSIVE_REPEAT: "a possessive repeat",
}
_BEGIN, _END = {c.AT_BEGINNING, c.AT_BEGINNING_STRING}, {c.AT_END, c.AT_END_STRING}


def regex_pattern(regex: str) -> Pattern:
    """The texts t for which re.fullmatch(regex, t) holds.

    Unsupported, in one line, for what Python refuses and for look-around, back-references, \\b and the like.
    """
    try:
        tree = _parser.parse(regex)
        flags = tree.state.flags
        if flags & re.LOCALE or (flags & re.MULTILINE and _has_anchor(tree)):
            raise Unsupported("the flags L, and m together with ^ or $, are not supported")
        return alt(_Translation(flags).anchored(list(tree)))
    except (re.error, OverflowError, Unsupported) as error:
        raise Unsupported(f"{regex!r}: {error}") from None


def _has_anchor(tree: Any) -> bool:
    return any(op is c.AT or any(_has_anchor(part) for part in _parts(argument)) for op, argument in tree)


def _parts(argument: Any) -> Sequence[Any]:
    """The sub-patterns in an operator's argument."""
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    if isinstance(argument, tuple | list):
        return [part for item in argument for part in _parts(item)]
    return []


class _Translation:
    """One regex."""

    def __init__(self, flags: int) -> None:
        self.flags = flags

    def anchored(self, items: list[Any]) -> list[Pattern]:
        """The alternatives of a sequence from the text's beginning to its end, where ^ and $ may stand."""
        while items and items[0][0] is c.AT and items[0][1] in _BEGIN:
            items = items[1:]
        while items and items[-1][0] is c.AT and items[-1][1] in _END:
            items = items[:-1]
        if len(items) == 1:  # a group or a choice may hold anchors too
            op, argument = items[0]
            branches = self._inner(op, argument)
            if branches is not None:
                flags, bodies = branches
                before, self.flags = self.flags, flags
                found = [one for body in bodies for one in self.anchored(list(body))]
                self.flags = before
                return found
        return [self.sequence(items)]

    def _inner(self, op: Any, argument: Any) -> tuple[int, list[Any]] | None:
        if op is c.SUBPATTERN:
            _, add, remove, body = argument
            if add & re.UNICODE:
                remove |= re.ASCII
            return (self.flags | add) & ~remove, [body]
        return (self.flags, argument[1]) if op is c.BRANCH else None

    def sequence(self, items: Any) -> Pattern:
        return seq(self.one(op, argument) for op, argument in items)

    def one(self, op: Any, argument: Any) -> Pattern:
        if op in _REFUSED:
            raise Unsupported(f"{_REFUSED[op]} is not supported")
        if op is c.AT:
            names = {c.AT_BOUNDARY: "\\b", c.AT_NON_BOUNDARY: "\\B"}
            raise Unsupported(f"{names.get(argument, '^ or $ inside the expression')} is not supported")
        if op in (c.MAX_REPEAT, c.MIN_REPEAT):  # a lazy repeat is one for a search; what fits a whole text is the same
            low, high, body = argument
            if low > _MAX_REPEAT or (high is not c.MAXREPEAT and high > _MAX_REPEAT):
                raise Unsupported(f"a repeat of more than {_MAX_REPEAT:,} times is not supported")
            return repeat(self.sequence(body), int(low), None if high is c.MAXREPEAT else int(high))
        inner = self._inner(op, argument)
        if inner is not None:
            before, self.flags = self.flags, inner[0]
            found = alt(self.sequence(body) for body in inner[1])
            self.flags = before
            return found
        return self._characters(op, argument)

    def _characters(self, op: Any, argument: Any) -> Pattern:
        if op is c.ANY:
            return chars([(0, sys.maxunicode)] if self.flags & re.DOTALL else complement([(10, 10)]))
        if op in (c.LITERAL, c.NOT_LITERAL):
            return self._set([(c.LITERAL, argument)], negated=op is c.NOT_LITERAL)
        if op is c.IN:
            negated = argument[0][0] is c.NEGATE
            return self._set(argument[negated:], negated)
        raise Unsupported(f"{op} is not supported")

    def _set(self, items: Sequence[tuple[Any, Any]], negated: bool) -> Pattern:
        """A set of characters; with the flag i it is written out again, and `re` itself says what it matches."""
        flags = self.flags & (re.IGNORECASE | re.ASCII)
        if flags & re.IGNORECASE:
            inside = "".join(_written(op, argument) for op, argument in items)
            return chars(_matching(f"[{'^' * negated}{inside}]+", flags))
        ranges = [part for op, argument in items for part in _ranges(op, argument, flags)]
        return chars(complement(ranges) if negated else ranges)


def _ranges(op: Any, argument: Any, flags: int) -> Sequence[Range]:
    """An item of a set."""
    if op is c.CATEGORY:
        return _matching(f"{_written(op, argument)}+", flags)
    return [argument if op is c.RANGE else (argument, argument)]


def _written(op: Any, argument: Any) -> str:
    """An item of a set as it stands between brackets."""
    if op is c.CATEGORY:
        letter = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[str(argument).rpartition("_")[2]]
        return "\\" + (letter.upper() if "NOT" in str(argument) else letter)
    low, high = argument if op is c.RANGE else (argument, argument)
    return f"\\U{low:08x}-\\U{high:08x}"


@cache
def _every_character() -> str:
    return "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))


@lru_cache(maxsize=256)
def _matching(expression: str, flags: int) -> tuple[Range, ...]:
    """The characters that a repeated set matches; a run that steps over the surrogates is two ranges."""
    runs = [(ord(match[0][0]), ord(match[0][-1])) for match in re.finditer(expression, _every_character(), flags)]
    return tuple(intersection(runs, [(0, 0xD7FF), (0xE000, sys.maxunicode)]))
