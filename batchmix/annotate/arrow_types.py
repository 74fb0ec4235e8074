"""JSON Schema to Arrow: the type of a column that holds every value which the schema allows.

| schema | column |
|---|---|
| enum or const of texts | dictionary<int32, string>, the schema's values in its order |
| integer, number, boolean, string | int64, float64, bool, string |
| array | list |
| object with properties | struct |
| anything else: no type, several types, open objects, recursion | string of JSON text |

`null` among the types only makes the value optional, which every column is anyway. Inside lists and structs an enum is a
plain string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

_PLAIN = {"integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_(), "string": pa.string()}
_MAX_DEPTH = 16


@dataclass(frozen=True)
class Field:
    """A column that answers fill."""

    name: str
    type: pa.DataType
    labels: Sequence[str] | None = None  # of an enum, in the order of its dictionary
    as_json: bool = False  # values of any kind, kept as JSON text
    schema: Any = field(default=None, compare=False, repr=False)  # JSON Schema of the values, None where there is none
    root: Any = field(default=None, compare=False, repr=False)  # the whole schema, where its `$ref` points to

    @property
    def arrow(self) -> pa.Field:
        return pa.field(self.name, self.type)

    @property
    def is_class(self) -> bool:
        """Whether answers are one of a few, so that there are precision, recall and a confusion matrix."""
        return self.labels is not None or self.type in (pa.bool_(), pa.int64())

    def column(self, values: Sequence[Any]) -> pa.Array:
        """Values as `parse` gives them, None where there is none."""
        if self.labels is not None:
            places = {label: place for place, label in enumerate(self.labels)}
            indices = [None if value is None else places[value] for value in values]
            return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(self.labels, pa.string()))
        if self.as_json:
            values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        return pa.array(values, self.type)


def enum_field(name: str, labels: Sequence[str]) -> Field:
    """The column of one of these labels."""
    return Field(name, pa.dictionary(pa.int32(), pa.string()), tuple(labels))


def field_of(name: str, schema: Any, root: Mapping[str, Any]) -> Field:
    """The column of a property; `root` is the whole schema, where `$ref` points to."""
    labels = text_enum(schema, root)
    if labels is not None:
        return replace(enum_field(name, labels), schema=schema, root=root)
    kind = _type(schema, root, 0)
    return Field(name, pa.string() if kind is None else kind, as_json=kind is None, schema=schema, root=root)


def text_enum(schema: Any, root: Mapping[str, Any]) -> list[str] | None:
    """The labels of a schema that allows certain texts (and maybe null) alone."""
    schema = without_null(schema, root)
    if not isinstance(schema, Mapping):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    values = [value for value in values or () if value is not None]
    return values if values and all(isinstance(value, str) for value in values) else None


def resolve(schema: Any, root: Mapping[str, Any]) -> Any:
    """The schema behind a local `$ref` (`#/$defs/Name`), followed as often as needed."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            return schema
        target: Any = root
        for part in str(schema["$ref"]).removeprefix("#").strip("/").split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            target = target.get(part) if isinstance(target, Mapping) else None
        schema = target
    return None


def without_null(schema: Any, root: Mapping[str, Any]) -> Any:
    """What is left of `anyOf: [X, {type: null}]` and `type: [X, "null"]`, and of an `allOf` of one."""
    schema = resolve(schema, root)
    if not isinstance(schema, Mapping):
        return schema
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            choices = [resolve(choice, root) for choice in schema[key]]
            left = [c for c in choices if not (isinstance(c, Mapping) and c.get("type") == "null")]
            return without_null(left[0], root) if len(left) == 1 else None
    if isinstance(schema.get("type"), list):
        kinds = [kind for kind in schema["type"] if kind != "null"]
        return {**schema, "type": kinds[0]} if len(kinds) == 1 else None
    return schema


def _type(schema: Any, root: Mapping[str, Any], depth: int) -> pa.DataType | None:
    """None: no single type."""
    schema = without_null(schema, root)
    if depth > _MAX_DEPTH or not isinstance(schema, Mapping):
        return None
    if text_enum(schema, root) is not None:
        return pa.string()
    if "enum" in schema or "const" in schema:
        values = [value for value in schema.get("enum", [schema.get("const")]) if value is not None]
        kinds = {type(value) for value in values}
        return {frozenset({bool}): pa.bool_(), frozenset({int}): pa.int64(), frozenset({float}): pa.float64(),
                frozenset({int, float}): pa.float64()}.get(frozenset(kinds))  # fmt: skip
    kind = schema.get("type")
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind == "array":
        item = _type(schema.get("items"), root, depth + 1)
        return None if item is None else pa.list_(item)
    if kind == "object" and schema.get("properties") and not schema.get("additionalProperties"):
        fields = [(name, _type(sub, root, depth + 1)) for name, sub in schema["properties"].items()]
        if all(found is not None for _, found in fields):
            return pa.struct([pa.field(name, found) for name, found in fields])
    return None
