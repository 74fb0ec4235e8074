"""Objects of a JSON Schema as patterns: declared properties in the schema's order, then those that a pattern or
`additionalProperties` says something of.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from batchmix.structured_output.alternatives import required_names
from batchmix.structured_output.automata import finite_texts
from batchmix.structured_output.dfa import both, build_automaton
from batchmix.structured_output.ecma_regex import found_automaton
from batchmix.structured_output.json_members import Member, members_graph
from batchmix.structured_output.json_strings import any_string, string_of
from batchmix.structured_output.json_values import dumps, refusal
from batchmix.structured_output.keywords import ONLY, Made
from batchmix.structured_output.limits import Atom, Limits
from batchmix.structured_output.pattern import NEVER, BeyondUs, Pattern, alt, literal, seq
from batchmix.structured_output.translator import Translator

_COLON = literal(": ")
_MAX_PATTERNS = 4  # of property names, in one object
_MAX_NAMES = 16  # of a pattern whose names are written as if they were declared


def object_of(value: Pattern) -> Pattern:
    """An object of any names."""
    return seq([literal("{"), members_graph([], seq([any_string(), _COLON, value]), 0, None), literal("}")])


def object_pattern(translation: Translator, limits: Sequence[Limits], path: str, depth: int) -> Pattern:
    """The objects within all limits. Unsupported for what cannot be kept."""
    return _Object(translation, limits, path, depth).pattern()


class _Object:
    def __init__(self, translation: Translator, limits: Sequence[Limits], path: str, depth: int) -> None:
        self._translation, self._limits, self._path, self._depth = translation, limits, path, depth
        self._words = [one.keywords for one in limits]
        self._required = required_names(limits)
        self._declared = list(
            dict.fromkeys(name for one in limits if one.declares for name in one.keywords.get("properties", ()))
        )
        self._forbidden = [name for one in limits for name in one.keywords.get("properties", ())]
        self._patterns = list(dict.fromkeys(name for one in self._words for name in one.get("patternProperties", ())))
        self._closed = any(one.get("unevaluatedProperties", True) is not True for one in self._words)
        self._names = [
            translation.atom(one.keywords["propertyNames"], one.base, f"{one.path}/propertyNames")
            for one in limits
            if "propertyNames" in one.keywords
        ]

    def pattern(self) -> Pattern:
        members: list[Member] = []
        names = [*self._declared, *(name for name in self._required if name not in self._declared)]
        allowed = self._finite_names()
        if allowed is not None and not self._declared:
            names += [name for name in allowed if name not in names]
        for name in names:
            value = self._value(name)
            if value != NEVER:
                members.append(Member(value, name in self._required, literal(f"{dumps(name, self._path)}: ")))
            elif name in self._required:
                return NEVER
        more: list[Pattern] = []
        for name_pattern, value in [] if allowed is not None else self._open(names):
            texts = finite_texts(build_automaton(name_pattern), _MAX_NAMES)
            if texts is None:
                more.append(seq([name_pattern, _COLON, value]))
            else:
                members += [Member(value, name=literal(f"{text}: ")) for text in texts]
        low = max((one.get("minProperties", 0) for one in self._words), default=0)
        high = min((one["maxProperties"] for one in self._words if "maxProperties" in one), default=None)
        if high is not None and high < low:
            return NEVER
        found = members_graph(members, alt(more) if more else None, low, high)
        if found == NEVER and more and low > 1:
            raise refusal(self._path, "has 'minProperties' of names that are not declared, which is not supported")
        return seq([literal("{"), found, literal("}")])

    def _finite_names(self) -> list[str] | None:
        """All names that `propertyNames` allows, where those are known."""
        if not self._names:
            return None
        values = self._translation.finite([*self._names, self._translation.atom(_TEXT, "", self._path)])
        return None if values is None else [value for value in values if isinstance(value, str)]

    def _value(self, name: str) -> Pattern:
        """The values of a property, NEVER where it must not be there."""
        constants = self._translation.alternatives.constants
        if not all(constants.holds(name, atom) for atom in self._names):
            return NEVER
        atoms = self._translation.alternatives.member(self._limits, name)
        if atoms is None or (self._closed and not self._is_evaluated(name)):
            return NEVER
        return self._translation.schema(atoms, f"{self._path}/properties/{name}", self._depth + 1)

    def _is_evaluated(self, name: str) -> bool:
        """Whether a schema that holds says something of the property, so that `unevaluatedProperties` does not."""
        for one in self._limits:
            words = one.keywords
            if one.silent or not one.declares:
                continue
            if name in words.get("properties", ()) or "additionalProperties" in words:
                return True
            if any(
                (found := found_automaton(regex)) is not None and found.has(name)
                for regex in words.get("patternProperties", ())
            ):
                return True
        return False

    def _open(self, names: Sequence[str]) -> list[tuple[Pattern, Pattern]]:
        """Names that are not declared, by the patterns that they match, with their values."""
        if len(self._patterns) > _MAX_PATTERNS:
            raise BeyondUs(
                f"{self._path or 'the schema'} has more than {_MAX_PATTERNS} patterns in 'patternProperties'"
            )
        found = []
        for count in range(len(self._patterns) + 1):
            for matched in combinations(self._patterns, count):
                atoms = self._schemas(matched)
                if atoms is None or (not atoms and (self._declared or self._patterns or self._closed)):
                    continue
                if self._closed and any(one.silent or not one.declares for one in self._limits):
                    continue  # which of them count is not worth telling
                value = self._translation.schema(atoms, f"{self._path}/additionalProperties", self._depth + 1)
                if value == NEVER:
                    continue
                others = tuple(one for one in self._patterns if one not in matched)
                name = string_of(0, None, matched, (), (*self._forbidden, *names), others)
                if self._names and name != NEVER:
                    allowed = self._translation.schema(
                        [*self._names, self._translation.atom(_TEXT, "", self._path)], f"{self._path}/propertyNames", 0
                    )
                    name = both([name, allowed])
                if name != NEVER:
                    found.append((name, value))
        return found

    def _schemas(self, matched: Sequence[str]) -> list[Atom] | None:
        """What names that match just these patterns lead to, as far as it says something; None: they are forbidden."""
        found: list[Atom] = []
        for one in self._limits:
            own = [(f"patternProperties/{name}", one.keywords["patternProperties"][name]) for name in matched
                   if name in one.keywords.get("patternProperties", ())]  # fmt: skip
            if not own and "additionalProperties" in one.keywords:
                own = [("additionalProperties", one.keywords["additionalProperties"])]
            for place, schema in own:
                if schema is False:
                    return None
                atom = self._translation.atom(schema, one.base, f"{one.path}/{place}")
                if schema is not True and (atom.negated or self._translation.reader.read(schema, atom.path)):
                    found.append(atom)
        return found


_TEXT = Made({"type": ONLY["string"]})
