"""ECMA-262's regular expressions as patterns: the texts in which one is found, as JSON Schema's `pattern` asks.

Each part is translated together with what follows it, so that an end of the text or a look-ahead, which say something
of all that follows, may stand anywhere but within a repeat.
"""

from __future__ import annotations

from functools import lru_cache

from batchmix.structured_output.automata import ByteAutomaton
from batchmix.structured_output.dfa import both, build_automaton
from batchmix.structured_output.ecma_syntax import Ahead, Choice, Concat, Edge, Node, Set, Syntax, Times
from batchmix.structured_output.pattern import (
    EMPTY,
    NEVER,
    Pattern,
    Unsupported,
    alt,
    chars,
    intersection,
    nullable,
    repeat,
    seq,
)

_MAX_UNROLLED = 64


@lru_cache(maxsize=1024)
def found_pattern(regex: str) -> Pattern:
    """The texts t with `new RegExp(regex, "u").test(t)`.

    Unsupported, in one line, for a regex that JavaScript refuses and for look-behind, back-references, \\b and the like.
    """
    try:
        syntax = Syntax(regex)
        return _Translation(syntax).texts()
    except Unsupported as error:
        raise type(error)(f"{regex!r}: {error}") from None


def found_automaton(regex: str) -> ByteAutomaton | None:
    """The automaton of those texts, None where there are none."""
    pattern = found_pattern(regex)
    return None if pattern == NEVER else build_automaton(pattern)


class _Translation:
    def __init__(self, syntax: Syntax) -> None:
        self._node = syntax.node
        self._last = 0xFFFF if syntax.legacy else 0x10FFFF  # beyond it a character is two without the flag u
        self._any = chars([(0, self._last)])
        self._rest = repeat(self._any, 0, None)

    def texts(self) -> Pattern:
        if not _has(self._node, Edge(False)):
            return seq([self._rest, self._followed(_least(self._node, 0), self._rest, False)])
        first = self._followed(self._node, self._rest, True)
        later = self._followed(self._node, self._rest, False)
        return alt([first] if later == NEVER else [first, seq([repeat(self._any, 1, None), later])])

    def _followed(self, node: Node, rest: Pattern, at_start: bool | None) -> Pattern:
        """The node and then `rest`, all up to the text's end. `at_start`: nothing comes before it; None: perhaps."""
        if not _has_assertion(node):
            return seq([self._plain(_least(node, -1) if rest is self._rest else node), rest])
        if isinstance(node, Edge):
            if node.is_end:
                return EMPTY if nullable(rest) else NEVER
            if at_start is None:
                raise Unsupported("^ behind what may be empty is not supported")
            return rest if at_start else NEVER
        if isinstance(node, Ahead):
            seen = self._followed(node.item, self._rest, at_start)
            return both([rest], [seen]) if node.negated else both([rest, seen])
        if isinstance(node, Choice):
            found = [self._followed(item, rest, at_start) for item in node.items]
            return alt(one for one in found if one != NEVER)
        if isinstance(node, Concat):
            starts = [at_start]
            for item in node.items[:-1]:
                low, zero = _width(item)
                starts.append(starts[-1] if zero else False if low or starts[-1] is False else None)
            for item, start in zip(reversed(node.items), reversed(starts), strict=True):
                rest = self._followed(item, rest, start)
            return rest
        assert isinstance(node, Times)
        if node.high is None or node.high > _MAX_UNROLLED:
            raise Unsupported("^, $ or look-ahead within a repeat is not supported")
        for turn in range(node.high, 0, -1):
            start = at_start if turn == 1 or at_start is False else None
            once = self._followed(node.item, rest, start)
            rest = once if turn <= node.low else alt(one for one in (once, rest) if one != NEVER)
        return rest

    def _plain(self, node: Node) -> Pattern:
        if isinstance(node, Set):
            return chars(intersection(node.ranges, [(0, self._last)]))
        if isinstance(node, Concat):
            return seq(map(self._plain, node.items))
        if isinstance(node, Choice):
            return alt(one for item in node.items if (one := self._plain(item)) != NEVER)
        assert isinstance(node, Times)
        return repeat(self._plain(node.item), node.low, node.high)


def _least(node: Node, place: int) -> Node:
    """A node before any text (`place` -1), or behind any (0), without what that text may be as well: of a{2,5} two."""
    if isinstance(node, Times):
        return Concat((node.item,) * node.low) if node.low <= _MAX_UNROLLED else Times(node.item, node.low, node.low)
    if isinstance(node, Choice):
        return Choice(tuple(_least(item, place) for item in node.items))
    if not isinstance(node, Concat) or not node.items:
        return node
    last = _least(node.items[place], place)
    rest = node.items[1:] if place == 0 else node.items[:-1]
    if last == Concat(()):
        return _least(Concat(rest), place)
    return Concat((last, *rest) if place == 0 else (*rest, last))


def _parts(node: Node) -> tuple[Node, ...]:
    if isinstance(node, Concat | Choice):
        return node.items
    return (node.item,) if isinstance(node, Times | Ahead) else ()


def _has(node: Node, wanted: Node) -> bool:
    return node == wanted or any(_has(part, wanted) for part in _parts(node))


def _has_assertion(node: Node) -> bool:
    return isinstance(node, Edge | Ahead) or any(map(_has_assertion, _parts(node)))


def _width(node: Node) -> tuple[int, bool]:
    """The fewest characters, up to one, and whether it never has one."""
    if isinstance(node, Set):
        return 1, False
    if isinstance(node, Edge | Ahead):
        return 0, True
    if isinstance(node, Times):
        low, zero = _width(node.item)
        return min(low, node.low), zero or node.high == 0
    widths = list(map(_width, node.items))
    lows = [low for low, _ in widths]
    low = min(1, sum(lows)) if isinstance(node, Concat) else min(lows, default=0)
    return low, all(zero for _, zero in widths)
