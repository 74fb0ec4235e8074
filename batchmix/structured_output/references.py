"""What `$schema`, `$id`, `$anchor` and `$ref` mean in a JSON Schema: its draft, and the place that each reference names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from batchmix.structured_output.json_values import refusal

_DRAFTS = {
    "json-schema.org/draft-04/schema": 4,
    "json-schema.org/draft-06/schema": 6,
    "json-schema.org/draft-07/schema": 7,
    "json-schema.org/draft/2019-09/schema": 2019,
    "json-schema.org/draft/2020-12/schema": 2020,
}
_OLD = ("json-schema.org/draft-00", "json-schema.org/draft-01", "json-schema.org/draft-02", "json-schema.org/draft-03")
_ONE = (
    "items",
    "additionalProperties",
    "additionalItems",
    "contains",
    "not",
    "if",
    "then",
    "else",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
)  # keywords of a schema
_LISTS = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_NAMED = ("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions")
_MAX_DEPTH = 64


@dataclass(frozen=True)
class Target:
    """What a reference names."""

    schema: Any
    base: str  # the address of the document that the schema stands in, for its own references
    name: str  # the same for two references to one place that are written alike


def draft_of(schema: Any) -> int:
    """4, 6, 7, 2019 or 2020, which a schema without `$schema`, or with one that is no draft, is. Unsupported for older ones."""
    name = schema.get("$schema") if isinstance(schema, Mapping) else None
    plain = name.removesuffix("#").rstrip("/").partition("://")[2] if isinstance(name, str) else ""
    if plain.startswith(_OLD):
        raise refusal("/$schema", f"is {name!r}; drafts 4, 6, 7, 2019-09 and 2020-12 of json-schema.org are supported")
    return _DRAFTS.get(plain, 2020)


class References:
    """The documents and anchors within one schema."""

    def __init__(self, root: Any, draft: int) -> None:
        self.draft = draft
        self._id = "id" if draft == 4 else "$id"
        self.documents: dict[str, Any] = {"": root}
        self._anchors: dict[tuple[str, str], Any] = {}
        self._bases: dict[int, str] = {}  # by identity of the schema, which the root keeps alive
        self._find(root, "", "", 0)

    def base_of(self, schema: Any, base: str, path: str) -> str:
        """The address of the document that `schema` is or stands in; `base` where it is no place for a schema."""
        if id(schema) not in self._bases and isinstance(schema, Mapping) and self._id in schema:
            raise refusal(f"{path}/{self._id}", "stands where no schema is looked for, so it would be read past")
        return self._bases.get(id(schema), base)

    def target(self, reference: Any, base: str, path: str) -> Target:
        """The schema that `reference`, in the document `base`, names. Unsupported where none within the root is."""
        if not isinstance(reference, str):
            raise refusal(path, f"must be a text, not {reference!r}")
        address, fragment = urldefrag(reference)
        address = urljoin(base, address) if address else base
        if address not in self.documents:
            raise refusal(path, f"{reference!r}: only references within the schema, #/..., are supported")
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            if (address, fragment) not in self._anchors:
                raise refusal(path, f"{reference!r} is not there: no schema has this anchor")
            return Target(self._anchors[address, fragment], address, f"{address}#{fragment}")
        schema, inner = self.documents[address], address
        for step in fragment.split("/")[1:]:
            inner = self._bases.get(id(schema), inner)
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(schema, list) and step.isdecimal() and int(step) < len(schema):
                schema = schema[int(step)]
            elif isinstance(schema, Mapping) and step in schema:
                schema = schema[step]
            else:
                raise refusal(path, f"{reference!r} is not there")
        return Target(schema, inner, f"{address}#{fragment}")

    def _find(self, schema: Any, base: str, path: str, depth: int) -> None:
        """Note the documents and anchors in `schema` and below."""
        if not isinstance(schema, Mapping):
            return
        if depth > _MAX_DEPTH:
            raise refusal(path, "is nested too deeply")
        if depth and "$schema" in schema and draft_of(schema) != self.draft:
            raise refusal(f"{path}/$schema", "is of another draft than the whole schema")
        inner = self._own_base(schema, base, path)
        if self._bases.setdefault(id(schema), inner) != inner:
            raise refusal(path, "stands in two documents")
        if inner != base:
            if inner in self.documents:
                raise refusal(f"{path}/{self._id}", f"names {inner!r}, which another part has as well")
            self.documents[inner] = schema
        for name in self._names(schema, path):
            if self._anchors.setdefault((inner, name), schema) is not schema:
                raise refusal(path, f"has the anchor {name!r}, which another part has as well")
        for place, part in _parts(schema):
            self._find(part, inner, f"{path}/{place}", depth + 1)

    def _own_base(self, schema: Mapping[str, Any], base: str, path: str) -> str:
        """The address of the document that `schema` begins, or else `base`."""
        own = schema.get(self._id)
        if own is None or (self.draft <= 7 and "$ref" in schema):  # which hides all that stands beside it
            return base
        if not isinstance(own, str):
            raise refusal(f"{path}/{self._id}", f"must be a text, not {own!r}")
        address, fragment = urldefrag(own)
        if fragment and (address or self.draft > 7):
            raise refusal(f"{path}/{self._id}", f"{own!r} has a fragment, which is not supported")
        return urljoin(base, address) if address else base

    def _names(self, schema: Mapping[str, Any], path: str) -> Iterator[str]:
        if self.draft > 7:
            for key in ("$anchor", "$dynamicAnchor") if self.draft == 2020 else ("$anchor",):
                if key in schema:
                    if not isinstance(schema[key], str):
                        raise refusal(f"{path}/{key}", f"must be a text, not {schema[key]!r}")
                    yield schema[key]
        elif "$ref" not in schema and isinstance(schema.get(self._id), str) and schema[self._id].startswith("#"):
            yield schema[self._id].removeprefix("#")


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas in a schema; not what only looks like one, in an enum or a default."""
    for key in _ONE:
        if key in schema:
            yield key, schema[key]
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            for index, part in enumerate(schema[key]):
                yield f"{key}/{index}", part
    for key in _NAMED:
        if isinstance(schema.get(key), Mapping):
            for name, part in schema[key].items():
                yield f"{key}/{name}", part
