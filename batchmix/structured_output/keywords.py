"""A JSON Schema's keywords in the form of draft 2020-12, whatever its draft, checked; what no draft knows is left out.

Validators read past keywords that they do not know, and past formats. So do we, and tell which, since a typing error is one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchmix.structured_output.json_values import refusal

TYPES = ("null", "boolean", "number", "string", "array", "object")
ONLY = {name: frozenset([name]) for name in TYPES}
# The first draft that has a keyword; earlier ones read past it.
SINCE = {"const": 6, "contains": 6, "propertyNames": 6, "if": 7, "dependentRequired": 2019, "dependentSchemas": 2019,
         "unevaluatedItems": 2019, "unevaluatedProperties": 2019, "minContains": 2019, "maxContains": 2019}  # fmt: skip
# Say nothing that a validator checks.
_ANNOTATIONS = {
    "title", "description", "default", "examples", "example", "$schema", "$id", "id", "$comment", "$defs", "definitions",
    "deprecated", "readOnly", "writeOnly", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary",
    "contentEncoding", "contentMediaType", "contentSchema",
}  # fmt: skip
_OF_TYPE = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains",
              "minContains", "maxContains", "unevaluatedItems"),
    "object": ("properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
               "maxProperties", "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedProperties"),
}  # fmt: skip
TYPE_OF_KEYWORD = {keyword: name for name, keywords in _OF_TYPE.items() for keyword in keywords}
_COMBINING = {"$ref", "$dynamicRef", "$recursiveRef", "type", "const", "enum", "anyOf", "oneOf", "allOf", "not", "if",
              "then", "else"}  # fmt: skip
KEYWORDS = _COMBINING | TYPE_OF_KEYWORD.keys()
_COUNTS = (
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minContains",
    "maxContains",
    "minProperties",
    "maxProperties",
)
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "dependentSchemas")
_SCHEMAS = ("items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else",
            "unevaluatedItems", "unevaluatedProperties")  # fmt: skip


@dataclass(frozen=True)
class Negated:
    """In the place of a schema: what that does not allow."""

    schema: Any


class Made(dict[str, Any]):
    """Keywords in the form of draft 2020-12 that the translation itself has made; they declare no properties."""


@dataclass
class Reader:
    """Reads the schemas of one document. `unknown` collects keywords that were read past."""

    draft: int
    unknown: dict[str, None] = field(default_factory=dict)
    _known: dict[int, tuple[Any, dict[str, Any]]] = field(default_factory=dict)  # by identity, which is kept alive

    def read(self, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        """The keywords that say something. `type` is a set of TYPES, "integer" besides "number" where a number must be
        one; draft 4's boolean bounds, lists of `items` and `dependencies` are those of draft 2020-12.

        Unsupported, in one line with the path, for values that a keyword cannot have.
        """
        if isinstance(schema, Made):
            return schema
        if id(schema) not in self._known:
            self._known[id(schema)] = schema, self._read(schema, path)
        return self._known[id(schema)][1]

    def _read(self, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        found = {key: value for key, value in schema.items() if key in KEYWORDS}
        for key in schema:
            if not isinstance(key, str):
                raise refusal(path, f"has the keyword {key!r}, which is no text")
            if key not in KEYWORDS and key not in _ANNOTATIONS:
                self.unknown.setdefault(key)
        if self.draft != 2020:
            found.pop("prefixItems", None)
        if isinstance(found.get("items"), list):
            found["prefixItems"] = found.pop("items")
            if "additionalItems" in found:
                found["items"] = found["additionalItems"]
        found.pop("additionalItems", None)
        if "type" in found:
            found["type"] = _types(found["type"], path)
        for key in _COUNTS:
            if key in found:
                found[key] = _count(found[key], f"{path}/{key}")
        for key in ("Minimum", "Maximum"):
            _boolean_bound(found, key, path)
        self._dependencies(found, path)
        _check(found, path)
        return found

    def _dependencies(self, found: dict[str, Any], path: str) -> None:
        """`dependencies`, which stands for two keywords since draft 2019-09."""
        both = found.pop("dependencies", {})
        _mapping(both, f"{path}/dependencies")
        names = {name: one for name, one in both.items() if isinstance(one, list | str)}
        schemas = {name: one for name, one in both.items() if name not in names}
        required = {**{name: [one] if isinstance(one, str) else one for name, one in names.items()}}
        if "dependentRequired" in found:
            _mapping(found["dependentRequired"], f"{path}/dependentRequired")
            required |= found["dependentRequired"]
        if "dependentSchemas" in found:
            _mapping(found["dependentSchemas"], f"{path}/dependentSchemas")
            schemas |= found["dependentSchemas"]
        for name, needed in required.items():
            _names(needed, f"{path}/dependentRequired/{name}")
        found |= {key: one for key, one in (("dependentRequired", required), ("dependentSchemas", schemas)) if one}


def unknown_line(unknown: Iterable[str]) -> str:
    """Names keywords that were read past, with those that may be meant."""
    parts = []
    for key in unknown:
        close = [name for name in KEYWORDS if name.lower() == key.lower()]
        close = close or difflib.get_close_matches(key, sorted(KEYWORDS), 1, 0.8)
        parts.append(f"{key!r} (did you mean {close[0]!r}?)" if close else repr(key))
    return ", ".join(parts)


def _types(value: Any, path: str) -> frozenset[str]:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or (name not in TYPES and name != "integer"):
            raise refusal(path, f"has type {name!r}, which JSON Schema does not have")
    found = set(names)
    if "number" in found:
        found.discard("integer")
    elif "integer" in found:
        found.add("number")
    return frozenset(found)


def _count(value: Any, path: str) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 0:
        raise refusal(path, f"must be a count, not {value!r}")
    return int(value)


def _boolean_bound(found: dict[str, Any], key: str, path: str) -> None:
    """Draft 4's `exclusiveMinimum`: true, which says what `minimum` is."""
    exclusive, inclusive = f"exclusive{key}", key.lower()
    if isinstance(found.get(exclusive), bool) and found.pop(exclusive) and inclusive in found:
        found[exclusive] = found.pop(inclusive)


def _check(found: Mapping[str, Any], path: str) -> None:
    for key in _LISTS:
        if key in found and (not isinstance(found[key], list) or (not found[key] and key != "prefixItems")):
            raise refusal(f"{path}/{key}", "must be a list of schemas")
    for key in _NAMED:
        if key in found:
            _mapping(found[key], f"{path}/{key}")
    for key in _SCHEMAS:
        if key in found and not isinstance(found[key], Mapping | bool):
            raise refusal(f"{path}/{key}", f"is no schema but {found[key]!r}")
    if "required" in found:
        _names(found["required"], f"{path}/required")
    if "enum" in found and not isinstance(found["enum"], list):
        raise refusal(f"{path}/enum", "must be a list")
    if "pattern" in found and not isinstance(found["pattern"], str):
        raise refusal(path, f"has the pattern {found['pattern']!r}, which is no text")


def _mapping(value: Any, path: str) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise refusal(path, "must be an object with texts as names")


def _names(value: Any, path: str) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise refusal(path, "must be a list of names")
