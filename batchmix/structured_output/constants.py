"""Constants of JSON Schemas: which of them keep the limits that stand beside them, and limits that exclude each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, Protocol

from batchmix.structured_output.ecma_regex import found_automaton
from batchmix.structured_output.json_strings import string_of
from batchmix.structured_output.json_values import Bounds, bounds, decimal, normal, refusal, type_of
from batchmix.structured_output.keywords import Reader
from batchmix.structured_output.limits import Atom, Limits
from batchmix.structured_output.pattern import NEVER, Pattern

_UNKNOWN = ("contains", "unevaluatedItems", "unevaluatedProperties")  # not checked in constants
_MAX_DEPTH = 64


class Schemas(Protocol):
    """What is asked of `Alternatives`."""

    def atom(self, schema: Any, base: str, path: str) -> Atom: ...

    def target(self, keywords: Mapping[str, Any], base: str, path: str) -> Atom | None: ...

    def member(self, limits: Sequence[Limits], name: str) -> list[Atom] | None: ...


class Constants:
    """Checks values against the schemas of one document."""

    def __init__(self, alternatives: Schemas, reader: Reader) -> None:
        self._alternatives, self._reader = alternatives, reader
        # By identity of the keywords, which are kept alive.
        self._values: dict[frozenset[int], tuple[Sequence[Limits], list[Any] | None]] = {}
        self._normal: dict[int, set[str]] = {}  # by identity of an enum, which the schema keeps alive

    def of(self, limits: Sequence[Limits]) -> list[Any] | None:
        """The only values that the limits allow, where they name constants."""
        key = frozenset(id(one.keywords) for one in limits)
        if key not in self._values:
            self._values[key] = limits, self._found(limits)
        return self._values[key][1]

    def _found(self, limits: Sequence[Limits]) -> list[Any] | None:
        given = []
        for one in limits:
            if "const" in one.keywords:
                given.append([one.keywords["const"]])
            if "enum" in one.keywords:
                given.append(one.keywords["enum"])
        if not given:
            return None
        first = min(given, key=len)
        return [value for value in first if all(self._keeps(value, one, 0, first) for one in limits)]

    def contradict(self, limits: Sequence[Limits]) -> bool:
        """Whether no value is within the limits; False where that is not seen."""
        types = None
        for one in limits:
            if "type" in one.keywords:
                types = one.keywords["type"] if types is None else types & one.keywords["type"]
        if types is not None and not types:
            return True
        values = self.of(limits)
        if values is not None:
            return not values
        if types is None or len(types - {"integer"}) != 1:
            return False
        if "number" in types:
            return number_bounds(limits).exclude_each_other or (integers_only(limits) and fractions_only(limits))
        if "string" in types:
            return string_pattern(limits) == NEVER
        kind = "Items" if "array" in types else "Properties"
        least = max((one.keywords.get(f"min{kind}", 0) for one in limits), default=0)
        return any(one.keywords.get(f"max{kind}", least) < least for one in limits)

    def holds(self, value: Any, atom: Atom, depth: int = 0) -> bool:
        """Whether the value is one of the schema's."""
        if depth > _MAX_DEPTH:
            raise refusal(atom.path, "is nested too deeply")
        if isinstance(atom.schema, bool):
            return atom.schema != atom.negated
        return self._valid(value, atom, depth) != atom.negated

    def _valid(self, value: Any, atom: Atom, depth: int) -> bool:
        words = self._reader.read(atom.schema, atom.path)
        target = self._alternatives.target(words, atom.base, atom.path)
        if target is not None and not self.holds(value, target, depth + 1):
            return False

        def part(schema: Any) -> bool:
            return self.holds(value, self._alternatives.atom(schema, atom.base, atom.path), depth + 1)

        if not all(map(part, words.get("allOf", ()))) or ("anyOf" in words and not any(map(part, words["anyOf"]))):
            return False
        if "oneOf" in words and sum(map(part, words["oneOf"])) != 1:
            return False
        if "not" in words and part(words["not"]):
            return False
        if "if" in words and not part(words.get("then" if part(words["if"]) else "else", True)):
            return False
        for name, schema in words.get("dependentSchemas", {}).items():
            if isinstance(value, Mapping) and name in value and not part(schema):
                return False
        return self._keeps(value, Limits(words, atom.base, atom.path), depth)

    def _keeps(self, value: Any, limits: Limits, depth: int, known: list[Any] | None = None) -> bool:
        """Whether the value is within what the schema itself says; it is one of the enum `known`."""
        words, kind = limits.keywords, type_of(value)
        if "type" in words and not self._has_type(value, words["type"]):
            return False
        if "const" in words and normal(value) != normal(words["const"]):
            return False
        if "enum" in words and words["enum"] is not known and normal(value) not in self._normals(words["enum"]):
            return False
        if words.get("fraction") and (kind != "number" or value == int(value)):
            return False
        if kind == "number":
            return _keeps_bounds(decimal(value, limits.path), words, limits.path)
        if kind == "string":
            return _keeps_text(value, words)
        if kind == "array":
            return self._keeps_items(value, limits, depth)
        return kind != "object" or self._keeps_members(value, limits, depth)

    def _normals(self, values: list[Any]) -> set[str]:
        if id(values) not in self._normal:
            self._normal[id(values)] = {normal(one) for one in values}
        return self._normal[id(values)]

    def _has_type(self, value: Any, types: frozenset[str]) -> bool:
        kind = type_of(value)
        if kind != "number" or "integer" not in types:
            return kind in types
        return isinstance(value, int) or (self._reader.draft != 4 and float(value).is_integer())

    def _keeps_items(self, value: list[Any], limits: Limits, depth: int) -> bool:
        words = limits.keywords
        _check_known(limits)
        if not words.get("minItems", 0) <= len(value) <= words.get("maxItems", len(value)):
            return False
        if words.get("uniqueItems") is True and len({normal(one) for one in value}) < len(value):
            return False
        first = words.get("prefixItems", [])
        schemas = [*first, *[words.get("items", True)] * max(0, len(value) - len(first))]
        atoms = [self._alternatives.atom(schema, limits.base, limits.path) for schema in schemas[: len(value)]]
        return all(self.holds(item, atom, depth + 1) for item, atom in zip(value, atoms, strict=True))

    def _keeps_members(self, value: Mapping[str, Any], limits: Limits, depth: int) -> bool:
        words = limits.keywords
        _check_known(limits)
        if not words.get("minProperties", 0) <= len(value) <= words.get("maxProperties", len(value)):
            return False
        needed = [*words.get("required", ())]
        needed += [name for key, names in words.get("dependentRequired", {}).items() if key in value for name in names]
        if not all(name in value for name in needed):
            return False
        names = self._alternatives.atom(words.get("propertyNames", True), limits.base, limits.path)
        for name, item in value.items():
            atoms = self._alternatives.member([limits], name)
            if atoms is None or not all(self.holds(item, atom, depth + 1) for atom in atoms):
                return False
            if not self.holds(name, names, depth + 1):
                return False
        return True


def _check_known(limits: Limits) -> None:
    for key in _UNKNOWN:
        if key in limits.keywords:
            raise refusal(limits.path, f"has the keyword {key!r} beside constants, which is not supported")


def _keeps_text(value: str, words: Mapping[str, Any]) -> bool:
    """Formats do not count: those that are known are narrower than a constant may be."""
    if not words.get("minLength", 0) <= len(value) <= words.get("maxLength", len(value)) or value in words.get(
        "notTexts", ()
    ):
        return False
    for key in ("pattern", "notPattern"):
        if key in words:
            automaton = found_automaton(words[key])
            if (automaton is not None and automaton.has(value)) != (key == "pattern"):
                return False
    return True


def _keeps_bounds(value: Decimal, words: Mapping[str, Any], path: str) -> bool:
    limits = bounds([(words, path)])
    if limits.low is not None and (value < limits.low or (limits.open_low and value == limits.low)):
        return False
    if limits.high is not None and (value > limits.high or (limits.open_high and value == limits.high)):
        return False
    if "multipleOf" not in words:
        return True
    step = Fraction(decimal(words["multipleOf"], f"{path}/multipleOf"))
    return step > 0 and Fraction(value) % step == 0


def number_bounds(limits: Sequence[Limits]) -> Bounds:
    """The narrowest of all bounds."""
    return bounds((one.keywords, one.path) for one in limits)


def integers_only(limits: Sequence[Limits]) -> bool:
    """Whether a number must be an integer."""
    return any("integer" in one.keywords.get("type", ()) for one in limits)


def fractions_only(limits: Sequence[Limits]) -> bool:
    """Whether a number must be none."""
    return any(one.keywords.get("fraction") for one in limits)


def string_pattern(limits: Sequence[Limits]) -> Pattern:
    """The strings within all limits. Unsupported for a `pattern` that no automaton can do."""
    words = [one.keywords for one in limits]
    low = max((one.get("minLength", 0) for one in words), default=0)
    high = min((one["maxLength"] for one in words if "maxLength" in one), default=None)
    regexes = [one["pattern"] for one in words if "pattern" in one]
    formats = [one["format"] for one in words if isinstance(one.get("format"), str)]
    texts = [text for one in words for text in one.get("notTexts", ())]
    others = [one["notPattern"] for one in words if "notPattern" in one]
    return string_of(low, high, tuple(regexes), tuple(formats), tuple(texts), tuple(others))
