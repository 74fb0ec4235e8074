"""Column types of data that states none, and rows checked against them."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterable
from itertools import chain
from typing import Any

import pyarrow as pa

from batchmix.input import strict_json
from batchmix.records import InputRow

_log = logging.getLogger(__name__)
# What pyarrow raises for a value that is not of the type asked for; lone surrogates cannot be encoded.
_MISFIT = (
    pa.ArrowInvalid,
    pa.ArrowTypeError,
    pa.ArrowNotImplementedError,
    OverflowError,
    UnicodeEncodeError,
    TypeError,
)
LOOSE = {b"batchmix": b"json"}  # metadata of a string column whose values may be anything, kept as JSON text
_MAX_TYPE_DEPTH = 32  # Arrow's IPC reader refuses more than 64 levels
_MAX_FIELDS = 256  # an object with more keys than this, over all rows, is a mapping rather than a record
_MAX_JSON_DEPTH = 200  # well below where Python's json gives up, which depends on who calls it
_MAX_WARNINGS = 20


def infer_schema(records: Iterable[dict[str, Any]]) -> pa.Schema:
    """The type of each column over a sample of JSON objects, columns in order of appearance.

    null where a column is null throughout; a string column of JSON text (LOOSE) where its values have no common type.
    """
    columns: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.items():
            columns.setdefault(name, []).append(value)
    return pa.schema([_infer_field(name, values) for name, values in columns.items() if is_unicode(name)])


def _infer_field(name: str, values: list[Any]) -> pa.Field:
    try:
        found = pa.infer_type(values)
    except _MISFIT:
        return loose(name)
    try:
        pa.array(values, found)
    except UnicodeEncodeError:
        pass  # the type is right; `Conformer` finds the rows whose text is not
    except _MISFIT:
        return loose(name)
    return pa.field(name, found) if _is_sane(found) and _fits(values, found, name, set()) else loose(name)


def loose(name: str) -> pa.Field:
    """A string column whose values may be anything, kept as JSON text."""
    return pa.field(name, pa.string(), metadata=LOOSE)


def settle(schema: pa.Schema) -> pa.Schema:
    """The schema with its columns of unknown type (null, or with null inside) as JSON text, and all nullable."""
    return pa.schema([loose(field.name) if _has_null(field.type) else field.with_nullable(True) for field in schema])


def _has_null(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or any(_has_null(kind.field(i).type) for i in range(kind.num_fields))


def _is_sane(kind: pa.DataType, depth: int = 0) -> bool:
    """Whether every reader of Arrow and Parquet can be expected to read it: neither deep nor wide nor empty."""
    if depth > _MAX_TYPE_DEPTH or kind.num_fields > _MAX_FIELDS or (pa.types.is_struct(kind) and not kind.num_fields):
        return False
    return all(_is_sane(kind.field(index).type, depth + 1) for index in range(kind.num_fields))


def as_json_text(value: Any) -> str | None:
    """What a column of JSON text holds for a value: strings as they are."""
    return value if value is None or isinstance(value, str) else strict_json.dumps(value)


class Conformer:
    """Checks rows against a schema, a chunk at a time. `known`: all the columns that the input is known to have."""

    def __init__(self, schema: pa.Schema, known: Iterable[str]) -> None:
        self._known = set(known)
        self._warned: set[str] = set()
        self._new_keys: set[str] = set()
        self._strict = [field for field in schema if field.metadata != LOOSE]
        self._loose = [field.name for field in schema if field.metadata == LOOSE]

    def check(self, rows: list[InputRow]) -> None:
        """Rows with a value that does not fit its column become error rows, and the value becomes None."""
        for field in self._strict:
            if not self._all_fit([row.columns.get(field.name) for row in rows], field):
                for row in rows:
                    self._check_value(row, field)
        for name in self._loose:
            for row in rows:
                value = row.columns.get(name)
                if value is not None:
                    self._check_text(row, name, value)
        for row in rows:
            if not row.columns.keys() <= self._known:
                self._new_keys |= row.columns.keys() - self._known
        if self._new_keys:
            self._warn()

    def _warn(self) -> None:
        new = sorted(self._new_keys - self._warned)
        if new and len(self._warned) < _MAX_WARNINGS:
            names = ", ".join(map(ascii, new[:_MAX_WARNINGS]))
            _log.warning("columns or keys first seen after the sample are left out of the output: %s", names)
            self._warned.update(new)
        self._new_keys.clear()

    def _all_fit(self, values: list[Any], field: pa.Field) -> bool:
        if not _fits(values, field.type, field.name, self._new_keys):
            return False
        try:
            pa.array(values, field.type)
        except _MISFIT:
            return False
        return True

    def _check_value(self, row: InputRow, field: pa.Field) -> None:
        value = row.columns.get(field.name)
        if not self._all_fit([value], field):
            row.columns[field.name] = None
            kind = str(field.type) if field.type.num_fields == 0 else f"value of the column's type {field.type}"
            row.error = row.error or f"column {field.name!a} holds {short(value)}, which is no {_clip(kind)}"

    @staticmethod
    def _check_text(row: InputRow, name: str, value: Any) -> None:
        try:
            if isinstance(value, list | dict) and _is_deep(value):
                raise ValueError
            (as_json_text(value) or "").encode()
        except (TypeError, ValueError):
            row.columns[name] = None
            row.error = row.error or f"column {name!a} holds {short(value)}, which is no text"


_EXACT: dict[pa.DataType, set[type]] = {
    pa.int64(): {int, type(None)},
    pa.float64(): {float, int, type(None)},
    pa.bool_(): {bool, type(None)},
    pa.string(): {str, type(None)},
}
"""Python types whose values pyarrow takes as they are, or refuses."""


def _fits(values: list[Any], kind: pa.DataType, path: str, new_keys: set[str]) -> bool:
    """Whether pyarrow keeps all of each value or refuses it: of others it makes something that fits, such as 2 of 2.5.

    A level of nesting is checked at once over all values. Keys that an object type does not have go to `new_keys`.
    """
    if kind in _EXACT and _EXACT[kind].issuperset(map(type, values)):
        return True
    if pa.types.is_integer(kind):
        return all(type(value) is not float or value.is_integer() for value in values)
    if pa.types.is_floating(kind):
        return bool not in map(type, values)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lists = [value for value in values if value is not None]
        if not {list}.issuperset(map(type, lists)):
            return False
        return _fits(list(chain.from_iterable(lists)), kind.value_type, path, new_keys)
    if pa.types.is_struct(kind):
        objects = [value for value in values if value is not None]
        if not {dict}.issuperset(map(type, objects)):
            return False
        names = {field.name for field in kind}
        if not names.issuperset(chain.from_iterable(objects)):
            new_keys.update(f"{path}.{key}" for key in set(chain.from_iterable(objects)) - names)
        return all(
            _fits([value.get(field.name) for value in objects], field.type, f"{path}.{field.name}", new_keys)
            for field in kind
        )
    return True


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded: JSON can state half of a surrogate pair, and undecodable bytes become one."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        level = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(item, list | dict)]  # fmt: skip
        if not level:
            return False
    return True


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def short(value: Any) -> str:
    """The value in ASCII on one line of at most 80 characters, for messages."""
    return _clip(_repr.repr(value).encode("ascii", "backslashreplace").decode())


def _clip(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
