"""Grammars in llguidance's notation, a dialect of Lark's: rules of terminals, and terminals that are regexes.

Its lexer takes the longest terminal that fits, so a pattern is one terminal as far as no name stands in it. JSON's texts
stay apart: what follows a value, a comma or a bracket, never goes on with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchmix.structured_output.automaton_regex import automaton_regex
from batchmix.structured_output.dfa import build_automaton
from batchmix.structured_output.pattern import (
    EMPTY,
    Alt,
    Both,
    Chars,
    Grammar,
    Graph,
    Named,
    Pattern,
    Range,
    Repeat,
    Seq,
    Unsupported,
    has_graph,
    intersection,
)

_MAX_TEXT = 2_000_000  # characters; 30,000 short choices have 600,000, and take the library a tenth of a second
_MAX_NODES = 20_000  # of graphs
_TOO_LONG = "it is too large without tables too"


def lark(grammar: Grammar, *befores: str) -> list[str]:
    """The texts of the grammar, once for each text in `befores` that stands in front. Unsupported where that would be too long."""
    writer = _Writer({name: f"rule_{number}" for number, name in enumerate(grammar.rules)})
    if grammar.schema is not None:
        start, lines = "schema", [f"schema: %json {grammar.schema}"]
    else:
        lines = [f"{writer.names[name]}: {writer.rule(pattern)}" for name, pattern in grammar.rules.items()]
        start = writer.rule(grammar.pattern)
        lines += [*writer.nodes, *(f"{name}: {text}" for text, name in writer.terminals.items())]
    if sum(map(len, lines)) > _MAX_TEXT:
        raise Unsupported(_TOO_LONG)
    found = []
    for before in befores:
        head = [f"start: BEFORE {start}", f"BEFORE: /{_literal(before)}/"] if before else [f"start: {start}"]
        found.append("\n".join([*head, *lines, ""]))
    return found


def regex_text(pattern: Pattern) -> str:
    """A pattern without names as a regex of sets and groups, which all engines read alike. Unsupported where none says it.

    Without the control characters that have no short escape in JSON: where a set has all of them, llguidance lets a string
    have quotation marks and backslashes too.
    """
    part = _Writer({}, [(0x08, 0x0A), (0x0C, 0x0D), (0x20, 0x10FFFF)]).part(pattern)
    if part.kind != _REGEX:
        raise Unsupported("has limits that hold at once, which no regex says")
    return part.text


_REGEX, _TERMINAL, _RULE = range(3)  # what a part can stand in, and in all that come after


@dataclass(frozen=True)
class _Part:
    text: str
    kind: int

    @property
    def terminal(self) -> str:
        """As an expression of terminals."""
        return f"/{self.text or '(?:)'}/" if self.kind == _REGEX else self.text  # `//` is a comment


class _Writer:
    def __init__(self, names: dict[str, str], within: Sequence[Range] = ((0, 0x10FFFF),)) -> None:
        self.names = names  # of rules
        self._within = within  # characters that may be written
        self.terminals: dict[str, str] = {}  # names by expression
        self.nodes: list[str] = []  # rules of graphs
        self._graphs = 0
        self._parts: dict[Pattern, _Part] = {}

    def rule(self, pattern: Pattern) -> str:
        return self._in_rule(self.part(pattern))

    def terminal(self, expression: str) -> str:
        return self.terminals.setdefault(expression, f"TERMINAL_{len(self.terminals)}")

    def _in_rule(self, part: _Part) -> str:
        if part.kind == _RULE:
            return part.text
        return self.terminal(part.terminal) if part.text else '""'

    def part(self, pattern: Pattern) -> _Part:
        """A pattern, written once."""
        if pattern not in self._parts:
            part = self._parts[pattern] = self._written(pattern)
            if len(part.text) > _MAX_TEXT or len(self.nodes) > _MAX_NODES:
                raise Unsupported(_TOO_LONG)
        return self._parts[pattern]

    def _written(self, pattern: Pattern) -> _Part:
        if isinstance(pattern, Chars):
            return _Part(_set(intersection(pattern.ranges, self._within)), _REGEX)
        if isinstance(pattern, Named):
            return _Part(self.names[pattern.name], _RULE)
        if isinstance(pattern, Graph):
            return self._graph(pattern)
        if isinstance(pattern, Both):
            return self._both(pattern)
        if isinstance(pattern, Repeat):
            item = self.part(pattern.item)
            times = f"{{{pattern.low},{'' if pattern.high is None else pattern.high}}}"
            return _Part(f"(?:{item.text}){times}" if item.kind == _REGEX else f"({item.text}){times}", item.kind)
        parts = [self.part(item) for item in pattern.items]
        kind = max((part.kind for part in parts), default=_REGEX)
        texts = [part.text for part in parts]
        if kind == _REGEX:
            return _Part("".join(texts) if isinstance(pattern, Seq) else f"(?:{'|'.join(texts)})", _REGEX)
        if isinstance(pattern, Alt):
            each = [part.terminal if kind == _TERMINAL else self._in_rule(part) for part in parts]
            return _Part(f"({' | '.join(each)})", kind)
        joined: list[_Part] = []  # neighbours that are one terminal
        for part in parts:
            if joined and joined[-1].kind == part.kind == _REGEX:
                joined[-1] = _Part(joined[-1].text + part.text, _REGEX)
            elif joined and max(joined[-1].kind, part.kind) == _TERMINAL:
                joined[-1] = _Part(f"{joined[-1].terminal} {part.terminal}", _TERMINAL)
            else:
                joined.append(part)
        if kind == _TERMINAL:
            return _Part(f"({joined[0].text})", _TERMINAL)
        return _Part(" ".join(map(self._in_rule, joined)), _RULE)

    def _both(self, pattern: Both) -> _Part:
        if has_graph(pattern):  # which no expression of terminals says
            return _Part(automaton_regex(build_automaton(pattern)), _REGEX)
        parts = [self.part(item).terminal for item in pattern.items]
        without = [f"~{self.part(item).terminal}" for item in pattern.without]
        return _Part(f"({' & '.join(parts + without)})", _TERMINAL)

    def _graph(self, pattern: Graph) -> _Part:
        """A rule for each node: the ways from it."""
        self._graphs += 1
        name = f"graph_{self._graphs}"
        ways: dict[int, list[str]] = {pattern.end: ['""']}
        for start, item, to in pattern.edges:
            ways.setdefault(start, []).append(f"{self.rule(item) if item != EMPTY else ''} {name}_{to}")
        self.nodes += [f"{name}_{node}: {' | '.join(texts)}" for node, texts in ways.items()]
        return _Part(f"{name}_0", _RULE)


def _set(ranges: Sequence[Range]) -> str:
    if not ranges:
        raise Unsupported("has characters that cannot be written in a string")
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _literal(chr(ranges[0][0]))
    spans = [f"\\u{{{low:x}}}-\\u{{{high:x}}}" for low, high in ranges]
    return f"[{''.join(spans)}]"


def _literal(text: str) -> str:
    return "".join(char if char.isascii() and char.isalnum() else f"\\u{{{ord(char):x}}}" for char in text)
