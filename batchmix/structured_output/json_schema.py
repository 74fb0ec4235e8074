"""JSON Schemas (drafts 4 to 2020-12) as patterns of the JSON text of their values.

The text is what Python's `json.dumps(value, ensure_ascii=False)` writes: one space after a comma and a colon, keys in
the order of `properties`. Each text that a pattern allows is a valid instance; what cannot be kept is refused by name.
Where a schema leaves things open the pattern is narrower: objects have the properties that are named and no others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

from batchmix.structured_output.json_strings import any_string, format_string, pattern_string
from batchmix.structured_output.json_values import TYPE_OF, bounds, count, dumps, has_type, kind_of, normal, refusal
from batchmix.structured_output.numbers import any_integer, any_number, integers_between, numbers_between
from batchmix.structured_output.pattern import (
    EMPTY,
    NEVER,
    Grammar,
    Named,
    Pattern,
    Unsupported,
    alt,
    literal,
    optional,
    repeat,
    separated,
    seq,
)
from batchmix.structured_output.references import References, draft_of

# Say nothing that a validator checks.
_ANNOTATIONS = {"title", "description", "default", "examples", "example", "$schema", "$id", "$comment", "$defs",
                "definitions", "deprecated", "readOnly", "writeOnly", "$anchor",
                "$dynamicAnchor", "$recursiveAnchor"}  # fmt: skip
_KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
    "boolean": set[str](),
    "null": set[str](),
}
_COMBINING = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_MAX_DEPTH = 32  # of schemas in one another, references followed
_ANYTHING = "any value"  # the name of a rule; no reference is called so
_COMMA, _COLON = literal(", "), literal(": ")


def json_schema_grammar(schema: Any) -> Grammar:
    """The texts of a schema's values. Unsupported, in one line, for what is no schema or cannot be kept."""
    translation = _Translation(schema)
    pattern = translation.schema(schema, "", 0)
    return Grammar(pattern, translation.rules)


class _Translation:
    def __init__(self, root: Any) -> None:
        self._draft = draft_of(root)
        self._annotations = _ANNOTATIONS | ({"id"} if self._draft == 4 else set())
        self._references = References(root, self._draft)
        self._base = ""  # the address of the document whose schemas are being translated
        self.rules: dict[str, Pattern] = {}  # what references stand for that lead to themselves
        self._open: dict[str, bool] = {}  # places that are being followed, and whether they were met again
        self._followed: dict[str, Pattern] = {}

    def schema(self, schema: Any, path: str, depth: int) -> Pattern:
        """`path` is where it stands, for messages."""
        with self._within(self._references.base_of(schema, self._base, path)):
            return self._schema(schema, path, depth)

    @contextmanager
    def _within(self, base: str) -> Iterator[None]:
        """Read references as those of the document `base`."""
        before, self._base = self._base, base
        try:
            yield
        finally:
            self._base = before

    def _schema(self, schema: Any, path: str, depth: int) -> Pattern:
        if depth > _MAX_DEPTH:
            raise refusal(path, "is nested too deeply")
        if schema is True or schema == {}:
            return self._anything()
        if schema is False:
            return NEVER
        if not isinstance(schema, Mapping):
            raise refusal(path, f"is no schema but {schema!r}")
        if "prefixItems" in schema and self._draft != 2020:
            raise refusal(path, "has the keyword 'prefixItems', which only draft 2020-12 has")
        for keyword in _COMBINING:
            if keyword in schema:
                return self._combined(keyword, schema, path, depth)
        if schema.keys() <= self._annotations - {"$defs", "definitions"}:  # definitions alone: a $ref is missing
            return self._anything()
        types = schema.get("type")
        if types is None:
            guess = [name for name, keywords in _KEYWORDS.items() if keywords & schema.keys() and name != "number"]
            unknown = sorted(schema.keys() - self._annotations - {key for names in _KEYWORDS.values() for key in names})
            if unknown:
                raise refusal(path, f"has the keyword {unknown[0]!r}, which is not supported")
            raise refusal(path, f"has no type{f'; give type: {guess[0]}' if guess else ''}")
        names = types if isinstance(types, list) else [types]
        for name in names:
            if not isinstance(name, str) or name not in _KEYWORDS:
                raise refusal(path, f"has type {name!r}, which JSON Schema does not have")
        known = {key for name in names for key in _KEYWORDS[name]}
        self._check_keywords(schema, known | {"type"}, path)
        return alt([getattr(self, f"_{name}")(schema, path, depth) for name in names])

    def _check_keywords(self, schema: Mapping[str, Any], known: Iterable[str], path: str) -> None:
        """Unsupported where the schema has a keyword that says something else."""
        for key in schema:
            harmless = key in self._annotations or (key == "uniqueItems" and schema[key] is False)
            if key not in known and not harmless:
                raise refusal(path, f"has the keyword {key!r}, which is not supported here")

    def _combined(self, keyword: str, schema: Mapping[str, Any], path: str, depth: int) -> Pattern:
        value = schema[keyword]
        where = f"{path}/{keyword}"
        if keyword in ("const", "enum"):
            self._check_keywords(schema, {keyword, "type"}, path)
            values = [value] if keyword == "const" else value
            if not isinstance(values, list):
                raise refusal(where, "must be a list")
            whole = self._draft != 4  # there 1.0 is no integer
            return alt([literal(dumps(one, where)) for one in values if has_type(one, schema.get("type"), whole)])
        self._check_keywords(schema, {keyword}, path)
        if keyword == "$ref":
            return self._reference(value, where, depth)
        if not isinstance(value, list) or not value:
            raise refusal(where, "must be a list of schemas")
        if keyword == "allOf" and len(value) > 1:
            raise refusal(where, "of more than one schema is not supported")
        if keyword == "oneOf":
            self._check_apart(value, where)
        return alt([self.schema(one, f"{where}/{i}", depth + 1) for i, one in enumerate(value)])

    def _reference(self, reference: Any, path: str, depth: int) -> Pattern:
        target = self._references.target(reference, self._base, path)
        name = target.name
        if name in self._open:
            self._open[name] = True
            return Named(name)
        if name not in self._followed:
            self._open[name] = False
            with self._within(target.base):
                found = self.schema(target.schema, reference.removeprefix("#"), depth + 1)
            if self._open.pop(name):
                self.rules[name] = found
                found = Named(name)
            self._followed[name] = found
        return self._followed[name]

    def _check_apart(self, schemas: list[Any], path: str) -> None:
        """oneOf is anyOf where no value can fit two of the schemas; that is seen by their types and constants."""
        types: set[str] = set()  # of which any value has been seen
        constants: dict[str, set[str]] = {}  # by type
        for schema in schemas:
            own = self._kinds(schema, path, 0)
            for kind, value in own:
                known = constants.get(kind, set())
                if kind in types or (known if value is None else value in known):
                    raise refusal(path, "is supported only for schemas of different types or constants; use anyOf")
            for kind, value in own:
                if value is None:
                    types.add(kind)
                else:
                    constants.setdefault(kind, set()).add(value)

    def _kinds(self, schema: Any, path: str, depth: int) -> list[tuple[str, str | None]]:
        """What a schema's values are: types, or constants with their types."""
        if isinstance(schema, Mapping) and depth <= _MAX_DEPTH:
            base = self._references.base_of(schema, self._base, path)
            if "$ref" in schema:
                target = self._references.target(schema["$ref"], base, path)
                with self._within(target.base):
                    return self._kinds(target.schema, path, depth + 1)
            if "const" in schema or isinstance(schema.get("enum"), list):
                values = [schema["const"]] if "const" in schema else schema["enum"]
                return [(kind_of(TYPE_OF.get(type(value), "")), normal(value)) for value in values]
            types = schema.get("type")
            if types is not None:
                return [(kind_of(str(name)), None) for name in (types if isinstance(types, list) else [types])]
        raise refusal(path, "is supported only for schemas that have a type or are constants; use anyOf")

    def _string(self, schema: Mapping[str, Any], path: str, depth: int) -> Pattern:
        low, high = count(schema, "minLength", path, 0), count(schema, "maxLength", path, None)
        given = [key for key in ("pattern", "format") if key in schema]
        if given and len(given) + (low != 0) + (high is not None) > 1:
            raise refusal(path, f"has {given[0]!r} together with other limits of the text, which is not supported")
        try:
            if "pattern" in schema:
                return pattern_string(schema["pattern"])
            if "format" in schema:
                return format_string(schema["format"])
        except Unsupported as error:
            raise refusal(path, str(error)) from None
        return any_string(low or 0, high)

    def _integer(self, schema: Mapping[str, Any], path: str, depth: int) -> Pattern:
        low, open_low, high, open_high = bounds(schema, path)
        if low is None and high is None:
            return any_integer()
        # Above 2 is from 3 on, above 2.5 too.
        least = None if low is None else Decimal(math.floor(low) + 1) if open_low else low
        most = None if high is None else Decimal(math.ceil(high) - 1) if open_high else high
        return integers_between(least, most)

    def _number(self, schema: Mapping[str, Any], path: str, depth: int) -> Pattern:
        low, open_low, high, open_high = bounds(schema, path)
        if low is None and high is None:
            return any_number()
        try:
            return numbers_between(low, open_low, high, open_high)
        except Unsupported as error:
            raise refusal(path, str(error)) from None

    def _anything(self) -> Pattern:
        """Any value."""
        if _ANYTHING not in self.rules:
            value = Named(_ANYTHING)
            array = seq([literal("["), _listed([], value, 0, None), literal("]")])
            atoms = [any_string(0, None), any_number(), literal("true"), literal("false"), literal("null")]
            self.rules[_ANYTHING] = alt([*atoms, array, _object_of(value)])
        return Named(_ANYTHING)

    def _boolean(self, schema: Mapping[str, Any], path: str, depth: int) -> Pattern:
        return alt([literal("true"), literal("false")])

    def _null(self, schema: Mapping[str, Any], path: str, depth: int) -> Pattern:
        return literal("null")

    def _array(self, schema: Mapping[str, Any], path: str, depth: int) -> Pattern:
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise refusal(f"{path}/prefixItems", "must be a list of schemas")
        fixed = [self.schema(one, f"{path}/prefixItems/{i}", depth + 1) for i, one in enumerate(first)]
        rest = NEVER
        low, high = count(schema, "minItems", path, 0) or 0, count(schema, "maxItems", path, None)
        if "items" in schema:
            rest = self.schema(schema["items"], f"{path}/items", depth + 1)
        elif high is None or high > len(fixed):
            if fixed:
                high = len(fixed)
            else:
                rest = self._anything()
        return seq([literal("["), _listed(fixed, rest, low, high), literal("]")])

    def _object(self, schema: Mapping[str, Any], path: str, depth: int) -> Pattern:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, Mapping) or not all(isinstance(name, str) for name in properties):
            raise refusal(f"{path}/properties", "must be an object with texts as names")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise refusal(f"{path}/required", "must be a list of names")
        missing = [name for name in required if name not in properties]
        if missing:
            raise refusal(f"{path}/required", f"names {missing[0]!r}, which properties does not have")
        extra = schema.get("additionalProperties")
        if not properties:
            if extra is False:
                return literal("{}")
            value = self._anything() if extra is None else self.schema(extra, f"{path}/additionalProperties", depth + 1)
            return _object_of(value)
        members = [
            (seq([literal(dumps(name, path)), _COLON, self.schema(one, f"{path}/properties/{name}", depth + 1)]),
             name in required)
            for name, one in properties.items()
        ]  # fmt: skip
        return seq([literal("{"), _members(members), literal("}")])


def _object_of(value: Pattern) -> Pattern:
    """An object of any names."""
    member = seq([any_string(0, None), _COLON, value])
    return seq([literal("{"), _listed([], member, 0, None), literal("}")])


def _listed(fixed: list[Pattern], rest: Pattern, low: int, high: int | None) -> Pattern:
    """low to high items with commas between them: the first ones of `fixed`, then any number of `rest`."""
    if high is not None and high < low:
        return NEVER
    found = []
    for length in range(low, min(len(fixed), len(fixed) if high is None else high) + 1):
        found.append(separated(fixed[:length], _COMMA))  # fewer than all, or just all
    if high is None or high > len(fixed):
        more_low, more_high = max(1, low - len(fixed)), None if high is None else high - len(fixed)
        another = repeat(
            seq([_COMMA, rest]), more_low - (not fixed), None if more_high is None else more_high - (not fixed)
        )
        found.append(seq([*([separated(fixed, _COMMA)] if fixed else [rest]), another]))
    return alt([one for one in found if one != NEVER])


def _members(members: list[tuple[Pattern, bool]]) -> Pattern:
    """Members in their order, commas between those that are there; those that are not required may be left out."""
    after = EMPTY  # what may follow once a member is there
    alone = EMPTY  # what may follow while there is none
    for member, required in reversed(members):
        first = seq([member, after])
        alone = first if required else alt([first, alone])
        later = seq([_COMMA, member])
        after = seq([later if required else optional(later), after])
    return alone
