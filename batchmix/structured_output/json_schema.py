"""JSON Schemas (drafts 4 to 2020-12) as patterns of the JSON text of their values.

The text is what Python's `json.dumps(value, ensure_ascii=False)` writes: one space after a comma and a colon, keys in
the order of `properties`. Each text that a pattern allows is a valid instance; what cannot be kept is refused by name.
Where a schema leaves things open the pattern is narrower: docs/guided.md says how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchmix.structured_output.alternatives import Alternatives, types_of
from batchmix.structured_output.automata import finite_texts
from batchmix.structured_output.constants import fractions_only, integers_only, number_bounds, string_pattern
from batchmix.structured_output.dfa import both, build_automaton
from batchmix.structured_output.json_arrays import array_of, array_pattern
from batchmix.structured_output.json_members import Member, members_graph
from batchmix.structured_output.json_objects import object_of, object_pattern
from batchmix.structured_output.json_strings import any_string
from batchmix.structured_output.json_values import decimal, dumps, normal, refusal
from batchmix.structured_output.keywords import KEYWORDS, TYPE_OF_KEYWORD, TYPES, Reader
from batchmix.structured_output.limits import Atom, Limits
from batchmix.structured_output.numbers import (
    any_fraction,
    any_integer,
    any_number,
    integers_between,
    multiples,
    numbers_between,
)
from batchmix.structured_output.pattern import (
    NEVER,
    BeyondUs,
    Grammar,
    Named,
    NoText,
    Pattern,
    Unsupported,
    alt,
    literal,
    seq,
)
from batchmix.structured_output.references import References, draft_of

_MAX_DEPTH = 48  # of schemas in one another, references followed
_ANYTHING = "any value"  # the name of a rule
_MAX_FINITE = 200  # values of a schema whose values are all known
_LIMITING = KEYWORDS - {"$ref", "$dynamicRef", "$recursiveRef", "anyOf", "oneOf", "allOf", "not", "if", "then", "else"}


def json_schema_grammar(schema: Any, unknown: dict[str, None] | None = None) -> Grammar:
    """The texts of a schema's values. `unknown` collects keywords that are read past.

    Unsupported, in one line, for what is no schema or cannot be kept.
    """
    translation = Translation(schema)
    pattern = translation.schema([translation.atom(schema, "", "")], "", 0)
    if unknown is not None:
        unknown.update(translation.reader.unknown)
    return Grammar(pattern, translation.rules)


class Translation:
    """Of one document."""

    def __init__(self, root: Any) -> None:
        draft = draft_of(root)
        self.reader = Reader(draft)
        self.alternatives = Alternatives(self.reader, References(root, draft))
        self.atom = self.alternatives.atom
        self.rules: dict[str, Pattern] = {}  # what schemas stand for that lead to themselves
        self._open: dict[frozenset[tuple[int, bool]], str] = {}  # being translated
        self._recursive: set[str] = set()  # of those, which were met again
        self._known: dict[frozenset[tuple[int, bool]], Pattern] = {}

    def schema(self, atoms: Sequence[Atom], path: str, depth: int) -> Pattern:
        """The values for which all of the schemas hold; `path` is where they stand, for messages."""
        if depth > _MAX_DEPTH:
            raise BeyondUs(f"{path} is nested too deeply")
        key = frozenset(atom.key for atom in atoms)
        if key in self._open:
            self._recursive.add(self._open[key])
            return Named(self._open[key])
        if key not in self._known:
            name = self._open[key] = f"{path}#{len(self._known)}#{len(self._open)}"
            try:
                found = self._translated(atoms, path, depth)
            finally:
                del self._open[key]
            if name in self._recursive:
                self.rules[name] = found
                found = Named(name)
            self._known[key] = found
        return self._known[key]

    def _translated(self, atoms: Sequence[Atom], path: str, depth: int) -> Pattern:
        try:
            found = self.alternatives.of(atoms)
        except Unsupported as error:
            raise error if str(error).startswith("/") else type(error)(f"{path or 'the schema'} {error}") from None
        root = (
            self.reader.read(atoms[0].schema, path) if len(atoms) == 1 and isinstance(atoms[0].schema, dict) else None
        )
        return alt(one for limits in found if (one := self._alternative(limits, root, path, depth)) != NEVER)

    def _alternative(self, limits: Sequence[Limits], root: Any, path: str, depth: int) -> Pattern:
        """`root` are the keywords of the schema that all limits come from, where they come from one."""
        values = self.alternatives.constants.of(limits)
        if values is not None:
            return alt(constant(value, path) for value in values)
        for one in limits:
            for key in ("unevaluatedProperties", "unevaluatedItems"):
                if one.keywords.get(key, True) is not True and one.keywords is not root:
                    raise refusal(one.path, f"has the keyword {key!r} within a schema that others stand beside, "
                                            "which is not supported; move it to the outer one")  # fmt: skip
        types = types_of(limits)
        said = [key for one in limits for key in one.keywords if key in _LIMITING or key not in KEYWORDS]
        if "type" not in said:
            hinted = {TYPE_OF_KEYWORD[key] for key in said if key in TYPE_OF_KEYWORD}
            if not hinted and len(types) == len(TYPES):
                return self.anything()
            types = types & hinted if hinted else types
        try:
            return alt(one for name in TYPES if name in types
                       if (one := getattr(self, f"_{name}")(limits, path, depth)) != NEVER)  # fmt: skip
        except NoText:
            raise
        except Unsupported as error:
            raise (
                error if str(error).startswith(("/", "the ")) else type(error)(f"{path or 'the schema'} {error}")
            ) from None

    def finite(self, atoms: Sequence[Atom]) -> list[Any] | None:
        """All values of the schemas, each once, None where they are too many or not all known."""
        values: dict[str, Any] = {}
        for limits in self.alternatives.of(atoms):
            known = self.alternatives.constants.of(limits)
            types = types_of(limits)
            if known is None and types <= {"boolean", "null"}:
                known = [
                    value for name, value in (("null", None), ("boolean", True), ("boolean", False)) if name in types
                ]
            if known is None and types == {"number"} and integers_only(limits):
                found = number_bounds(limits)
                if found.low is None or found.high is None or found.high - found.low > _MAX_FINITE:
                    return None
                inside = self._number(limits, "", 0)
                if inside == NEVER:
                    continue
                known = [
                    int(text) for text in finite_texts(build_automaton(inside), 2 * _MAX_FINITE) or () if text != "-0"
                ]
            if known is None:
                return None
            for value in known:
                values.setdefault(normal(value), value)
        return list(values.values()) if len(values) <= _MAX_FINITE else None

    def anything(self) -> Pattern:
        """Any value."""
        if _ANYTHING not in self.rules:
            value = Named(_ANYTHING)
            atoms = [any_string(), any_number(), literal("true"), literal("false"), literal("null")]
            self.rules[_ANYTHING] = alt([*atoms, array_of(value), object_of(value)])
        return Named(_ANYTHING)

    def _string(self, limits: Sequence[Limits], path: str, depth: int) -> Pattern:
        return string_pattern(limits)

    def _number(self, limits: Sequence[Limits], path: str, depth: int) -> Pattern:
        found, whole = number_bounds(limits), integers_only(limits)
        if found.exclude_each_other or (whole and fractions_only(limits)):
            return NEVER
        between = found.low, found.open_low, found.high, found.open_high
        if found.low is None and found.high is None:
            parts = [any_integer() if whole else any_number()]
        else:
            parts = [integers_between(*between) if whole else numbers_between(*between)]
        if fractions_only(limits):
            parts.append(any_fraction())
        for one in limits:
            if "multipleOf" in one.keywords:
                step = decimal(one.keywords["multipleOf"], f"{one.path}/multipleOf")
                if step <= 0:
                    raise refusal(f"{one.path}/multipleOf", f"must be above 0, not {step}")
                try:
                    parts.append(multiples(step, whole))
                except Unsupported as error:
                    raise refusal(f"{one.path}/multipleOf", str(error)) from None
        return both(parts)

    def _boolean(self, limits: Sequence[Limits], path: str, depth: int) -> Pattern:
        return alt([literal("true"), literal("false")])

    def _null(self, limits: Sequence[Limits], path: str, depth: int) -> Pattern:
        return literal("null")

    def _array(self, limits: Sequence[Limits], path: str, depth: int) -> Pattern:
        return array_pattern(self, limits, path, depth)

    def _object(self, limits: Sequence[Limits], path: str, depth: int) -> Pattern:
        return object_pattern(self, limits, path, depth)


def constant(value: Any, path: str) -> Pattern:
    """A constant as it is written; its parts are those of other arrays and objects, which lark.py does not join."""
    if isinstance(value, list) and value:
        items = members_graph([Member(constant(item, path), True) for item in value], None, 0, None)
        return seq([literal("["), items, literal("]")])
    if isinstance(value, Mapping) and value:
        members = [
            Member(constant(item, path), True, literal(f"{dumps(name, path)}: ")) for name, item in value.items()
        ]
        return seq([literal("{"), members_graph(members, None, 0, None), literal("}")])
    return literal(dumps(value, path))
