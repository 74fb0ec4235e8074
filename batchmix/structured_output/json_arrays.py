"""Arrays of a JSON Schema as patterns."""

from __future__ import annotations

from collections.abc import Sequence

from batchmix.structured_output.json_members import COMMA, Member, members_graph
from batchmix.structured_output.json_values import dumps, refusal
from batchmix.structured_output.limits import Atom, Limits
from batchmix.structured_output.pattern import EMPTY, NEVER, Pattern, Unsupported, graph, literal, repeat, seq
from batchmix.structured_output.translator import Translator

_MAX_ORDERS = 6  # values of which unique items may come in any order: 64 nodes, 192 ways
_MAX_FIRST = 1_000


def array_of(item: Pattern) -> Pattern:
    """Any number of items."""
    return seq([literal("["), _from(item, 0, None), literal("]")])


def array_pattern(translation: Translator, limits: Sequence[Limits], path: str, depth: int) -> Pattern:
    """The arrays within all limits. Unsupported for what cannot be kept."""
    words = [one.keywords for one in limits]
    for one in limits:
        least = one.keywords.get("minContains", 1)
        if "contains" in one.keywords and (least > 0 or "maxContains" in one.keywords):
            raise refusal(one.path, "has the keyword 'contains', which is not supported; say it with prefixItems")
    low = max((one.get("minItems", 0) for one in words), default=0)
    high = min((one["maxItems"] for one in words if "maxItems" in one), default=None)
    count = max((len(one.get("prefixItems", ())) for one in words), default=0)
    closed = any(one.get("unevaluatedItems", True) is not True for one in words)
    if closed:  # only what a schema that holds says something of
        known = [one.keywords for one in limits if one.declares and not one.silent]
        if not any("items" in one for one in known):
            count = max((len(one.get("prefixItems", ())) for one in known), default=0)
            high = count if high is None else min(high, count)
    if count and not any("items" in one for one in words):
        high = count if high is None else min(high, count)  # items that nothing is said of are not written
    first: list[Pattern] = []
    for place in range(count if high is None else min(count, high)):
        found = translation.schema(_item(translation, limits, place), f"{path}/prefixItems/{place}", depth + 1)
        if found == NEVER:
            high = place
            break
        first.append(found)
    rest_atoms = _item(translation, limits, count)
    rest = NEVER
    if high is None or high > len(first):
        if low > len(first) + _MAX_FIRST * 100:
            raise Unsupported("needs too many items")
        rest = translation.schema(rest_atoms, f"{path}/items", depth + 1)
        if rest == NEVER:
            high = len(first)
    if high is not None and high < low:
        return NEVER
    if any(one.get("uniqueItems") is True for one in words) and (high is None or high > 1):
        return seq([literal("["), _unique(translation, rest_atoms, len(first), low, high, path), literal("]")])
    edges: list[tuple[int, Pattern, int]] = []
    end = len(first) + 1
    for place in range(len(first) + 1):
        if low <= place:
            edges.append((place, EMPTY, end))
        if place < len(first):
            edges.append((place, seq([COMMA, first[place]]) if place else first[place], place + 1))
    if rest != NEVER:
        more_low, more_high = max(1, low - len(first)), None if high is None else high - len(first)
        more = repeat(seq([COMMA, rest]), more_low, more_high) if first else _from(rest, more_low, more_high)
        edges.append((len(first), more, end))
    return seq([literal("["), graph(edges, end), literal("]")])


def _from(item: Pattern, low: int, high: int | None) -> Pattern:
    """low to high items with commas between them."""
    if high is not None and high < max(1, low):
        return EMPTY if low == 0 else NEVER
    some = seq([item, repeat(seq([COMMA, item]), max(0, low - 1), None if high is None else high - 1)])
    return repeat(some, 0, 1) if low == 0 else some


def _item(translation: Translator, limits: Sequence[Limits], place: int) -> list[Atom]:
    """The schemas of the item at this place."""
    found = []
    for one in limits:
        first = one.keywords.get("prefixItems", ())
        if place < len(first):
            found.append(translation.atom(first[place], one.base, f"{one.path}/prefixItems/{place}"))
        elif "items" in one.keywords:
            found.append(translation.atom(one.keywords["items"], one.base, f"{one.path}/items"))
    return found


def _unique(
    translation: Translator, atoms: Sequence[Atom], first: int, low: int, high: int | None, path: str
) -> Pattern:
    """Items of which no two are equal."""
    values = translation.finite(atoms) if not first else None
    if values is None:
        raise refusal(path, "has the keyword 'uniqueItems', which is supported for items of an enum, booleans and null;"
                            " leave it out and check the answers")  # fmt: skip
    texts = [literal(dumps(value, path)) for value in values]
    if len(texts) > _MAX_ORDERS:  # in the order of the enum
        return members_graph([Member(text) for text in texts], None, low, high)
    end = 1 << len(texts)
    edges: list[tuple[int, Pattern, int]] = []
    for there in range(end):  # a node is the set of values that are there, a bit each
        if low <= there.bit_count() and (high is None or there.bit_count() <= high):
            edges.append((there, EMPTY, end))
        for place, text in enumerate(texts):
            if not there >> place & 1:
                edges.append((there, seq([COMMA, text]) if there else text, there | 1 << place))
    return graph(edges, end)
