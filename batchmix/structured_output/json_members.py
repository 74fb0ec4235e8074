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
    required = [place for place, member in enumerate(members) if member.required]
    low = 0 if low <= len(required) else low
    if high is not None and more is None and high >= len(members):
        high = None
    cap = high if high is not None else max(low, 1)  # counts beyond it are told apart no more
    if (len(members) + 2) * (cap + 1) > _MAX_NODES:
        raise BeyondUs("has too many properties or items to count; leave out the limits of their number")
    nodes: dict[tuple[int, int, str], int] = {(0, 0, "next"): 0}

    def node(place: int, count: int, kind: str) -> int:
        """`next`: a member from this place on follows; `after`: one may, behind a comma."""
        return nodes.setdefault((place, count, kind), len(nodes))

    edges: list[tuple[int, Pattern, int]] = []
    last, end = len(members), node(0, 0, "end")
    for count in range(cap + 1):
        after = None if count == high else min(count + 1, cap)  # one more, None where that is too many
        for place in range(last + 1):
            if count >= low and (not required or place > required[-1]) and (count or not place):
                edges.append((node(place, count, "after" if count else "next"), EMPTY, end))
            if after is None:
                continue
            if count:
                edges.append((node(place, count, "after"), COMMA, node(place, count, "next")))
            if place < last:
                member, start = members[place], node(place, count, "next")
                if not member.required:
                    edges.append((start, EMPTY, node(place + 1, count, "next")))
                if member.name == EMPTY:
                    edges.append((start, member.value, node(place + 1, after, "after")))
                else:
                    value = node(place, after, "value")
                    edges += [(start, member.name, value), (value, member.value, node(place + 1, after, "after"))]
            elif more is not None and after >= low:
                others = repeat(seq([COMMA, more]), 0, None if high is None else high - after)
                edges.append((node(last, count, "next"), seq([more, others]), end))
    return graph(dict.fromkeys(edges), end)
