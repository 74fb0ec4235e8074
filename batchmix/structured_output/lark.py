"""Grammars in llguidance's notation, a dialect of Lark's: rules of terminals, and terminals that are regexes.

Its lexer takes the longest terminal that fits, so a pattern is one terminal as far as no name stands in it. JSON's texts
stay apart: what follows a value, a comma or a bracket, never goes on with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchmix.structured_output.pattern import Alt, Chars, Grammar, Named, Pattern, Repeat, Seq, Unsupported

_MAX_TEXT = 2_000_000  # characters; 30,000 short choices have 600,000, and take the library a tenth of a second


def lark(grammar: Grammar, before: str = "") -> str:
    """The texts of the grammar, each with the text `before` in front of it. Unsupported where that would be too long."""
    writer = _Writer({name: f"rule_{number}" for number, name in enumerate(grammar.rules)})
    lines = [f"{writer.names[name]}: {writer.rule(pattern)}" for name, pattern in grammar.rules.items()]
    start = f"start: {writer.terminal(_literal(before)) if before else ''} {writer.rule(grammar.pattern)}"
    terminals = [f"{name}: /{regex}/" for regex, name in writer.terminals.items()]
    return "\n".join([start, *lines, *terminals, ""])


@dataclass(frozen=True)
class _Part:
    text: str
    is_regex: bool  # otherwise what a rule consists of


class _Writer:
    def __init__(self, names: dict[str, str]) -> None:
        self.names = names  # of rules
        self.terminals: dict[str, str] = {}  # names by regex
        self._parts: dict[Pattern, _Part] = {}

    def rule(self, pattern: Pattern) -> str:
        return self._in_rule(self._part(pattern))

    def terminal(self, regex: str) -> str:
        return self.terminals.setdefault(regex, f"TERMINAL_{len(self.terminals)}")

    def _in_rule(self, part: _Part) -> str:
        return self.terminal(part.text) if part.is_regex else part.text

    def _part(self, pattern: Pattern) -> _Part:
        if pattern not in self._parts:
            part = self._parts[pattern] = self._written(pattern)
            if len(part.text) > _MAX_TEXT:
                raise Unsupported("it is too large without tables too")
        return self._parts[pattern]

    def _written(self, pattern: Pattern) -> _Part:
        if isinstance(pattern, Chars):
            return _Part(_set(pattern), True)
        if isinstance(pattern, Named):
            return _Part(self.names[pattern.name], False)
        if isinstance(pattern, Repeat):
            item = self._part(pattern.item)
            times = f"{{{pattern.low},{'' if pattern.high is None else pattern.high}}}"
            return _Part(f"(?:{item.text}){times}", True) if item.is_regex else _Part(f"({item.text}){times}", False)
        parts = [self._part(item) for item in pattern.items]
        if all(part.is_regex for part in parts):
            texts = [part.text for part in parts]
            return _Part("".join(texts) if isinstance(pattern, Seq) else f"(?:{'|'.join(texts)})", True)
        if isinstance(pattern, Alt):
            return _Part(f"({' | '.join(map(self._in_rule, parts))})", False)
        joined: list[_Part] = []
        for part in parts:
            if joined and joined[-1].is_regex and part.is_regex:
                joined[-1] = _Part(joined[-1].text + part.text, True)
            else:
                joined.append(part)
        return _Part(" ".join(map(self._in_rule, joined)), False)


def _set(pattern: Chars) -> str:
    if len(pattern.ranges) == 1 and pattern.ranges[0][0] == pattern.ranges[0][1]:
        return _literal(chr(pattern.ranges[0][0]))
    spans = [f"\\u{{{low:x}}}-\\u{{{high:x}}}" for low, high in pattern.ranges]
    return f"[{''.join(spans)}]"


def _literal(text: str) -> str:
    return "".join(char if char.isascii() and char.isalnum() else f"\\u{{{ord(char):x}}}" for char in text)
