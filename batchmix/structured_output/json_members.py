"""Members between commas, some of which may be left out, as graphs in which all share what follows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchmix.structured_output.pattern import EMPTY, BeyondUs, Pattern, graph, literal, repeat, seq

COMMA = literal(", ")
_MAX_NODES = 4_000


@dataclass(frozen=True)
class Member:
    """What stands between two commas: an item, or a value behind its `name`."""

    value: Pattern
    required: bool = False
    name: Pattern = EMPTY  # with the colon. A way of its own in the graph, so that lark.py never makes one text of both


def members_graph(members: Sequence[Member], more: Pattern | None, low: int, high: int | None) -> Pattern:
    """The members in their order, then any number of `more`; from `low` to `high` of them (None: no limit).

    All of `more` count as one towards `low`, since they may be the same member again. NEVER where there is no such text.
    """
    required = sum(member.required for member in members)
    low = 0 if low <= required else low
    if high is not None and more is None and high >= len(members):
        high = None
    cap = high if high is not None else low if low > 1 else 1  # counts beyond it are told apart no more
    if (len(members) + 2) * (cap + 1) > _MAX_NODES:
        raise BeyondUs("has too many properties or items to count; leave out the limits of their number")
    nodes: dict[tuple[int, int, str], int] = {(0, 0, "after"): 0}

    def node(place: int, count: int, kind: str = "after") -> int:
        return nodes.setdefault((place, count, kind), len(nodes))

    edges: list[tuple[int, Pattern, int]] = []

    def counted(count: int) -> int | None:
        """One more, None where that is too many."""
        return None if high is not None and count == high else min(count + 1, cap)

    last = len(members)
    for place, member in enumerate(members):
        for count in range(cap + 1):
            after = counted(count)
            if not member.required:
                edges.append((node(place, count), EMPTY, node(place + 1, count)))
            if after is not None:
                start = node(place, after, "start") if high is None and cap == 1 else node(place, count, "start")
                edges.append((node(place, count), COMMA if count else EMPTY, start))
                edges += _ways(start, member, node(place, after, "value"), node(place + 1, after))
    end = node(last + 2, 0)
    for count in range(cap + 1):
        if count >= low:
            edges.append((node(last, count), EMPTY, end))
        after = counted(count)
        if more is None or after is None:
            continue
        start = node(last, count, "start")
        edges.append((node(last, count), COMMA if count else EMPTY, start))
        if after < low:
            continue
        if high is None:
            edges.append((start, seq([more, repeat(seq([COMMA, more]), 0, None)]), end))
        else:
            edges.append((start, seq([more, repeat(seq([COMMA, more]), 0, high - after)]), end))
    return graph(dict.fromkeys(edges), end)


def _ways(start: int, member: Member, between: int, end: int) -> list[tuple[int, Pattern, int]]:
    if member.name == EMPTY:
        return [(start, member.value, end)]
    return [(start, member.name, between), (between, member.value, end)]
