"""The syntax of ECMA-262's regular expressions (https://tc39.es/ecma262/#sec-patterns), as JSON Schema's `pattern` has them.

Unicode mode, the flag u. A pattern that is wrong there but not without the flag (`\\_`, a lone brace) is read as it is
without it; `Syntax.legacy` tells, since characters beyond U+FFFF are two there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from batchmix.structured_output.pattern import Range, Unsupported, complement, intersection
from batchmix.structured_output.unicode_sets import assigned, property_ranges

_MAX_REPEAT = 100_000
_MAX_DEPTH = 100
_LAST = 0x10FFFF
_CLASSES: dict[str, tuple[Range, ...]] = {
    "d": ((0x30, 0x39),),
    "w": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    "s": ((0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
          (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
}  # fmt: skip
_LINE_ENDS: tuple[Range, ...] = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
_CONTROL = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
_SYNTAX = "^$\\.*+?()[]{}|/"


@dataclass(frozen=True)
class Set:
    """One character."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Concat:
    """One after the other."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of them."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Times:
    """From `low` to `high` times, None: no limit."""

    item: Node
    low: int
    high: int | None


@dataclass(frozen=True)
class Edge:
    """The text's beginning or its end."""

    is_end: bool


@dataclass(frozen=True)
class Ahead:
    """A look-ahead."""

    item: Node
    negated: bool


Node: TypeAlias = Set | Concat | Choice | Times | Edge | Ahead


class Syntax:
    """One regex; `node` is what it says. Unsupported, in one line, where it is wrong or uses what no automaton can do."""

    def __init__(self, regex: str) -> None:
        self.regex = regex
        self.legacy = False
        self._at = 0
        self._depth = 0
        self._names: set[str] = set()
        self.node = self._choice()
        if self._at < len(regex):
            raise Unsupported("has a ) without (")

    def _peek(self, text: str) -> bool:
        return self.regex.startswith(text, self._at)

    def _take(self, text: str) -> bool:
        found = self._peek(text)
        self._at += len(text) * found
        return found

    def _next(self) -> str:
        if self._at >= len(self.regex):
            raise Unsupported("ends too early")
        self._at += 1
        return self.regex[self._at - 1]

    def _choice(self) -> Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unsupported("is nested too deeply")
        found = [self._sequence()]
        while self._take("|"):
            found.append(self._sequence())
        self._depth -= 1
        return found[0] if len(found) == 1 else Choice(tuple(found))

    def _sequence(self) -> Node:
        items: list[Node] = []
        while self._at < len(self.regex) and self.regex[self._at] not in "|)":
            item = self._quantified(self._atom())
            before = items[-1] if items else None
            if isinstance(before, Ahead) and isinstance(before.item, Set) and isinstance(item, Set):
                # (?!x)[a-z] is one character, so that it may be repeated.
                ranges = complement(before.item.ranges) if before.negated else before.item.ranges
                items[-1] = Set(tuple(intersection(ranges, item.ranges)))
            else:
                items.append(item)
        return items[0] if len(items) == 1 else Concat(tuple(items))

    def _quantified(self, item: Node) -> Node:
        low: int
        high: int | None
        if self._take("*"):
            low, high = 0, None
        elif self._take("+"):
            low, high = 1, None
        elif self._take("?"):
            low, high = 0, 1
        else:
            counts = self._counts()
            if counts is None:
                return item
            low, high = counts
        self._take("?")  # lazy: what a search takes first, not what it finds
        if isinstance(item, Edge | Ahead):
            raise Unsupported("repeats an assertion, which is not supported")
        return Times(item, low, high)

    def _counts(self) -> tuple[int, int | None] | None:
        start = self._at
        if not self._take("{"):
            return None
        low = self._number()
        high = low
        if low is not None and self._take(","):
            high = self._number()
        if low is None or not self._take("}"):
            self._at = start
            return None
        if high is not None and high < low:
            raise Unsupported("has a repeat whose numbers are out of order")
        if max(low, high or 0) > _MAX_REPEAT:
            raise Unsupported(f"a repeat of more than {_MAX_REPEAT:,} times is not supported")
        return low, high

    def _number(self) -> int | None:
        start = self._at
        while self._at < len(self.regex) and self.regex[self._at] in "0123456789":
            self._at += 1
        return int(self.regex[start : self._at][:9]) if self._at > start else None

    def _atom(self) -> Node:
        char = self._next()
        if char == "^":
            return Edge(False)
        if char == "$":
            return Edge(True)
        if char == ".":
            return Set(tuple(complement(_LINE_ENDS)))
        if char == "(":
            return self._group()
        if char == "[":
            return Set(self._class())
        if char == "\\":
            return self._escape()
        if char in "*+?":
            raise Unsupported(f"has a {char} that repeats nothing")
        if char in "{}]":  # wrong in Unicode mode
            self.legacy = True
        return Set(((ord(char), ord(char)),))

    def _group(self) -> Node:
        ahead: bool | None = None
        if self._take("?"):
            if self._take("=") or self._take("!"):
                ahead = self.regex[self._at - 1] == "!"
            elif self._peek("<=") or self._peek("<!"):
                raise Unsupported("look-behind (?<=...) is not supported")
            elif self._take("<"):
                end = self.regex.find(">", self._at)
                name = self.regex[self._at : end]
                if end < 0 or not name.isidentifier() or name in self._names:
                    raise Unsupported("has a group whose name is none, or another's")
                self._names.add(name)
                self._at = end + 1
            elif not self._take(":"):
                raise Unsupported("has a group (?...) that ECMA-262 does not have or that is not supported")
        inner = self._choice()
        if not self._take(")"):
            raise Unsupported("has a ( without )")
        return inner if ahead is None else Ahead(inner, ahead)

    def _escape(self) -> Node:
        char = self._next()
        if char in "bB":
            raise Unsupported(f"\\{char} is not supported")
        if char in "123456789" or char == "k":
            raise Unsupported("a back-reference is not supported")
        return Set(self._escaped(char, in_class=False))

    def _escaped(self, char: str, in_class: bool) -> tuple[Range, ...]:
        """The characters of an escape; `char` stands behind the backslash."""
        if char.lower() in _CLASSES:
            found = _CLASSES[char.lower()]
            return tuple(complement(found)) if char.isupper() else found
        if char in "pP":
            if not self._take("{") or (end := self.regex.find("}", self._at)) < 0:
                raise Unsupported(f"has \\{char} without a property in braces")
            name, self._at = self.regex[self._at : end], end + 1
            found = property_ranges(name)
            # What has no meaning yet may have one in the validator's version of Unicode.
            return tuple(intersection(complement(found), assigned())) if char == "P" else found
        code = self._code(char, in_class)
        return ((code, code),)

    def _code(self, char: str, in_class: bool) -> int:
        if char in _CONTROL:
            return _CONTROL[char]
        if char == "b" and in_class:
            return 8
        if char == "0":
            if self._at < len(self.regex) and self.regex[self._at] in "0123456789":
                raise Unsupported("has an octal escape, which is not supported")
            return 0
        if char == "c":
            letter = self._next()
            if not (letter.isascii() and letter.isalpha()):
                raise Unsupported("has \\c without a letter")
            return ord(letter) % 32
        if char == "x":
            return self._hex(2)
        if char == "u":
            if self._take("{"):
                end = self.regex.find("}", self._at)
                digits, self._at = self.regex[self._at : end], end + 1
                if end < 0 or not digits or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
                    raise Unsupported("has \\u{...} without hexadecimal digits")
                if int(digits, 16) > _LAST:
                    raise Unsupported("has a character beyond Unicode's last")
                return int(digits, 16)
            high = self._hex(4)
            if 0xD800 <= high < 0xDC00 and self._take("\\u"):
                low = self._hex(4)
                if 0xDC00 <= low < 0xE000:
                    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00)
                self._at -= 6
            return high
        if char in _SYNTAX or (in_class and char == "-"):
            return ord(char)
        if char.isalnum():
            raise Unsupported(f"has the escape \\{char}, which ECMA-262 does not have")
        self.legacy = True
        return ord(char)

    def _hex(self, count: int) -> int:
        digits = self.regex[self._at : self._at + count]
        if len(digits) < count or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
            raise Unsupported(f"has an escape that needs {count} hexadecimal digits")
        self._at += count
        return int(digits, 16)

    def _class(self) -> tuple[Range, ...]:
        negated = self._take("^")
        found: list[Range] = []
        has_property = False
        while not self._take("]"):
            has_property = has_property or self._peek("\\p") or self._peek("\\P")
            low = self._member()
            if self._peek("-") and not self._peek("-]"):
                self._at += 1
                high = self._member()
                if _is_class(low) or _is_class(high):  # [\w-.], which is wrong in Unicode mode
                    self.legacy = True
                    found += [*low, (0x2D, 0x2D), *high]
                    continue
                if low[0][0] > high[0][0]:
                    raise Unsupported("has a range whose ends are out of order")
                found.append((low[0][0], high[0][0]))
            else:
                found += low
        if not negated:
            return tuple(intersection(found, [(0, _LAST)]))
        rest = complement(found)
        return tuple(intersection(rest, assigned()) if has_property else rest)

    def _member(self) -> Sequence[Range]:
        char = self._next()
        if char != "\\":
            return ((ord(char), ord(char)),)
        char = self._next()
        if char in "123456789B" or char == "k":
            raise Unsupported(f"has the escape \\{char} between brackets, which is not supported")
        return self._escaped(char, in_class=True)


def _is_class(ranges: Sequence[Range]) -> bool:
    return len(ranges) != 1 or ranges[0][0] != ranges[0][1]
