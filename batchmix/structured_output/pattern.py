"""Patterns: sets of texts, built from sets of characters by sequence, choice and repetition.

What a regex, a JSON Schema or a list of choices allows is one pattern; dfa.py makes an automaton of it. A schema that
refers to itself is a grammar: patterns that name each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, TypeAlias

Range: TypeAlias = tuple[int, int]  # code points, both ends included
_LAST = 0x10FFFF
_MAX_ITEMS = 100_000
_SURROGATES = (0xD800, 0xDFFF)  # no characters: UTF-8 has no bytes for them


@dataclass(frozen=True)
class Chars:
    """One character of the set; ranges ascend and neither touch nor overlap."""

    ranges: tuple[Range, ...]


def _hash(pattern: Seq | Alt | Repeat | Both | Graph) -> int:
    """Found once for each object: parts of a pattern are often the same object, so that walking it takes too long."""
    known: int | None = pattern.__dict__.get("_hash")
    if known is None:
        parts: tuple[Any, ...]
        if isinstance(pattern, Repeat):
            parts = pattern.item, pattern.low, pattern.high
        elif isinstance(pattern, Graph):
            parts = pattern.edges, pattern.end
        else:
            parts = (*pattern.items, None, *pattern.without) if isinstance(pattern, Both) else pattern.items
        known = pattern.__dict__["_hash"] = hash((type(pattern).__name__, parts))
    return known


@dataclass(frozen=True)
class Seq:
    """One after the other; none: the empty text."""

    items: tuple[Pattern, ...]
    __hash__ = _hash


@dataclass(frozen=True)
class Alt:
    """One of them; none: no text at all."""

    items: tuple[Pattern, ...]
    __hash__ = _hash


@dataclass(frozen=True)
class Repeat:
    """`item`, at least `low` and at most `high` times (None: any number)."""

    item: Pattern
    low: int
    high: int | None
    __hash__ = _hash


@dataclass(frozen=True)
class Both:
    """The texts of all `items` that none of `without` has. No names stand in it; `dfa.both` makes it."""

    items: tuple[Pattern, ...]
    without: tuple[Pattern, ...]
    __hash__ = _hash


@dataclass(frozen=True)
class Graph:
    """The texts along the ways from node 0 to node `end`: members that may be left out share what follows them."""

    edges: tuple[tuple[int, Pattern, int], ...]  # from a node, a text, to a node
    end: int
    __hash__ = _hash


@dataclass(frozen=True)
class Named:
    """The texts of a grammar's rule, in which the name may stand again."""

    name: str


Pattern: TypeAlias = Chars | Seq | Alt | Repeat | Both | Graph | Named
EMPTY: Pattern = Seq(())
NEVER: Pattern = Alt(())


@dataclass(frozen=True)
class Grammar:
    """A pattern, and what the names in it stand for; without names it is one that a finite automaton accepts."""

    pattern: Pattern
    rules: Mapping[str, Pattern] = field(default_factory=dict)
    schema: str | None = None  # a JSON Schema that llguidance is to read, in the place of pattern and rules


class Unsupported(ValueError):
    """What a grammar cannot do; the message is one line that names the feature."""


class NoText(Unsupported):
    """Nothing that fits."""

    def __init__(self) -> None:
        super().__init__("no text fits: an enum is empty, bounds exclude each other, or something requires itself")


class TooLarge(Unsupported):
    """More than tables can hold."""


class BeyondUs(Unsupported):
    """A JSON Schema that is right, but more than our compiler can work out."""


def chars(ranges: Iterable[Range]) -> Pattern:
    """One character of these ranges, which may overlap, without surrogates; NEVER where none is left."""
    merged: list[Range] = []
    for low, high in sorted(ranges):
        for start, end in ((low, min(high, _SURROGATES[0] - 1)), (max(low, _SURROGATES[1] + 1), min(high, _LAST))):
            if start > end:
                continue
            if merged and start <= merged[-1][1] + 1:
                merged[-1] = merged[-1][0], max(merged[-1][1], end)
            else:
                merged.append((start, end))
    return Chars(tuple(merged)) if merged else NEVER


def complement(ranges: Iterable[Range]) -> list[Range]:
    """All code points but these."""
    rest, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            rest.append((start, low - 1))
        start = max(start, high + 1)
    return [*rest, (start, _LAST)] if start <= _LAST else rest


def intersection(left: Iterable[Range], right: Iterable[Range]) -> list[Range]:
    """The code points of both."""
    return complement([*complement(left), *complement(right)])


def literal(text: str) -> Pattern:
    """This text and no other."""
    return seq(map(_character, text))


@lru_cache(maxsize=4096)  # lists of choices have hundreds of thousands
def _character(char: str) -> Pattern:
    return chars([(ord(char), ord(char))])


def seq(items: Iterable[Pattern]) -> Pattern:
    """`items` one after the other. TooLarge where a pattern of a few definitions, each twice in the one before, is one."""
    flat: list[Pattern] = []
    for item in items:
        if item == NEVER:
            return NEVER
        flat += item.items if isinstance(item, Seq) else [item]
        if len(flat) > _MAX_ITEMS:
            raise TooLarge(f"a text of more than {_MAX_ITEMS:,} parts is not supported")
    return flat[0] if len(flat) == 1 else Seq(tuple(flat))


def alt(items: Iterable[Pattern]) -> Pattern:
    """One of `items`."""
    flat: list[Pattern] = []
    for item in items:
        flat += item.items if isinstance(item, Alt) else [item]
    flat = list(dict.fromkeys(flat))
    return flat[0] if len(flat) == 1 else Alt(tuple(flat))


def repeat(item: Pattern, low: int, high: int | None) -> Pattern:
    """`item`, from `low` to `high` times (None: no limit); NEVER where that is no number of times."""
    if high is not None and high < low:
        return NEVER
    if high == 0 or item == EMPTY:
        return EMPTY
    if item == NEVER:
        return EMPTY if low == 0 else NEVER
    return item if (low, high) == (1, 1) else Repeat(item, low, high)


def optional(item: Pattern) -> Pattern:
    """`item` or nothing."""
    return repeat(item, 0, 1)


def graph(edges: Iterable[tuple[int, Pattern, int]], end: int) -> Pattern:
    """The texts along the ways from node 0 to `end`, without ways that lead nowhere; NEVER where there is none."""
    kept = [edge for edge in edges if edge[1] != NEVER]
    reached = _met({0}, [(start, to) for start, _, to in kept])
    leading = _met({end}, [(to, start) for start, _, to in kept])
    if end not in reached:
        return NEVER
    return Graph(tuple(edge for edge in kept if edge[0] in reached and edge[2] in leading), end)


def has_graph(pattern: Pattern) -> bool:
    """Whether a graph is part of the pattern. Found once for each object."""
    if isinstance(pattern, Chars | Named | Graph):
        return isinstance(pattern, Graph)
    known: bool | None = pattern.__dict__.get("_has_graph")
    if known is None:
        parts = (pattern.item,) if isinstance(pattern, Repeat) else pattern.items
        more = pattern.without if isinstance(pattern, Both) else ()
        known = pattern.__dict__["_has_graph"] = any(map(has_graph, (*parts, *more)))
    return known


def _met(nodes: set[int], ways: Iterable[tuple[int, int]]) -> set[int]:
    """The nodes, and those that ways lead to from them."""
    following: dict[int, list[int]] = {}
    for start, to in ways:
        following.setdefault(start, []).append(to)
    todo = list(nodes)
    while todo:
        new = set(following.get(todo.pop(), ())) - nodes
        nodes |= new
        todo += new
    return nodes


def nullable(pattern: Pattern) -> bool:
    """Whether the empty text is one of the pattern's, which has no names and no graphs."""
    if isinstance(pattern, Seq):
        return all(map(nullable, pattern.items))
    if isinstance(pattern, Alt):
        return any(map(nullable, pattern.items))
    if isinstance(pattern, Repeat):
        return pattern.low == 0 or nullable(pattern.item)
    if isinstance(pattern, Both):
        return all(map(nullable, pattern.items)) and not any(map(nullable, pattern.without))
    assert isinstance(pattern, Chars)
    return False


def separated(items: Iterable[Pattern], separator: Pattern) -> Pattern:
    """All of `items`, with the separator between them."""
    parts: list[Pattern] = []
    for item in items:
        parts += [separator, item] if parts else [item]
    return seq(parts)


def without_dead_ends(grammar: Grammar) -> Grammar:
    """The same texts, without what never comes to an end, as a rule that always needs itself."""
    rules = dict(grammar.rules)
    ending: frozenset[str] = frozenset()
    while found := {name for name in rules.keys() - ending if _Ending(ending).has_text(rules[name])}:
        ending |= found
    only = _Ending(ending).only
    return Grammar(only(grammar.pattern), {name: only(rules[name]) for name in rules if name in ending})


class _Ending:
    """What patterns are where the rules `names` are those known to have texts. Each pattern is looked at once."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self.has_text: Callable[[Pattern], bool] = cache(self._has_text)
        self.only: Callable[[Pattern], Pattern] = cache(self._only)

    def _has_text(self, pattern: Pattern) -> bool:
        if isinstance(pattern, Named):
            return pattern.name in self._names
        if isinstance(pattern, Seq):
            return all(map(self.has_text, pattern.items))
        if isinstance(pattern, Alt):
            return any(map(self.has_text, pattern.items))
        if isinstance(pattern, Graph):
            kept = [(start, EMPTY, to) for start, item, to in pattern.edges if self.has_text(item)]
            return graph(kept, pattern.end) != NEVER
        return isinstance(pattern, Chars | Both) or pattern.low == 0 or self.has_text(pattern.item)

    def _only(self, pattern: Pattern) -> Pattern:
        """The pattern's texts in which no other names stand."""
        if isinstance(pattern, Named):
            return pattern if pattern.name in self._names else NEVER
        if isinstance(pattern, Seq):
            return seq(map(self.only, pattern.items))
        if isinstance(pattern, Alt):
            return alt([found for item in pattern.items if (found := self.only(item)) != NEVER])
        if isinstance(pattern, Graph):
            return graph([(start, self.only(item), to) for start, item, to in pattern.edges], pattern.end)
        if isinstance(pattern, Chars | Both):
            return pattern
        return repeat(self.only(pattern.item), pattern.low, pattern.high)


@cache
def utf8(ranges: tuple[Range, ...]) -> tuple[tuple[Range, ...], ...]:
    """Character ranges as sequences of byte ranges: a character's bytes fall into exactly one of the sequences."""
    found: list[tuple[Range, ...]] = []
    for low, high in ranges:
        for start, end in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, _LAST)):
            if low <= end and high >= start:
                _split(max(low, start), min(high, end), found)
    return tuple(found)


def _split(low: int, high: int, found: list[tuple[Range, ...]]) -> None:
    """Characters low..high of one encoded length, cut so that every byte runs over a range of its own."""
    first, last = chr(low).encode(errors="surrogatepass"), chr(high).encode(errors="surrogatepass")
    for place in range(1, len(first)):  # from the longest tail of continuation bytes on
        tail = 6 * (len(first) - place)
        mask = (1 << tail) - 1
        if low >> tail != high >> tail:
            if low & mask:
                _split(low, low | mask, found)
                _split((low | mask) + 1, high, found)
                return
            if high & mask != mask:
                _split(low, (high & ~mask) - 1, found)
                _split(high & ~mask, high, found)
                return
    found.append(tuple(zip(first, last, strict=True)))
