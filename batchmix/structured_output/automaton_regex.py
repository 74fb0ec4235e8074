"""A regex of an automaton's texts, for what has no other: its states are taken out one by one (Brzozowski, McCluskey 1963)."""

from __future__ import annotations

from batchmix.structured_output.automata import ByteAutomaton
from batchmix.structured_output.pattern import Unsupported

_MAX_LENGTH = 100_000


def automaton_regex(automaton: ByteAutomaton) -> str:
    """A regex of sets and groups. Unsupported where it would be long, or where a text is not ASCII."""
    start, end = len(automaton.accepts), len(automaton.accepts) + 1
    ways: dict[tuple[int, int], str] = {(start, 0): ""}

    def add(before: int, after: int, regex: str) -> None:
        known = ways.get((before, after))
        ways[before, after] = regex if known is None else f"(?:{known}|{regex})"
        if len(ways[before, after]) > _MAX_LENGTH:
            raise Unsupported("it is too large without tables too")

    for state, edges in enumerate(automaton.edges):
        for low, high, after in edges:
            if high > 0x7F:
                raise Unsupported("has limits that hold at once which need tables")
            plain = chr(low).isalnum() and chr(high).isalnum()
            add(state, after, f"[{chr(low)}-{chr(high)}]" if plain else f"[\\u{{{low:x}}}-\\u{{{high:x}}}]")
        if automaton.accepts[state]:
            add(state, end, "")
    left = set(range(len(automaton.accepts)))
    while left:
        gone = min(left, key=lambda state: _length(ways, state))
        left.remove(gone)
        loop = ways.pop((gone, gone), None)
        again = "" if loop is None else f"(?:{loop})*"
        into = [(before, regex) for (before, after), regex in ways.items() if after == gone]
        out = [(after, regex) for (before, after), regex in ways.items() if before == gone]
        ways = {pair: regex for pair, regex in ways.items() if gone not in pair}
        for before, first in into:
            for after, last in out:
                add(before, after, f"{first}{again}{last}")
    return f"(?:{ways.get((start, end), '')})"


def _length(ways: dict[tuple[int, int], str], state: int) -> int:
    """About what the regexes have more once the state is gone."""
    into = [len(regex) for (before, after), regex in ways.items() if after == state != before]
    out = [len(regex) for (before, after), regex in ways.items() if before == state != after]
    loop = len(ways.get((state, state), ""))
    return sum(into) * len(out) + sum(out) * len(into) + loop * len(into) * len(out)
