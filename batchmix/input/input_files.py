"""A list of files as one data set: their columns merged, and their rows one file after another."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchmix.errors import BatchmixError
from batchmix.input.arrow_readers import plain
from batchmix.input.chunk import BadRecord, Chunk, Record, Wanted, everything
from batchmix.input.config import DataFormat
from batchmix.input.csv_types import infer_csv_schema, parse_field
from batchmix.input.data_file import DataFile
from batchmix.input.formats import count_rows, read_chunks, stated_schema
from batchmix.input.in_parallel import in_parallel
from batchmix.input.openai_batch import OPENAI_SCHEMA
from batchmix.input.read_log import Extent, ReadLog, find_change
from batchmix.input.schema import LOOSE, infer_schema, loose, settle
from batchmix.input.text_readers import TEXT_SCHEMA, csv_header

_TEXT_FORMATS = (DataFormat.jsonl, DataFormat.csv, DataFormat.text)  # which state no types
_SAMPLE_ROWS = 10_000  # of the JSON-lines files and of the CSV files, from which their columns' types are inferred
_SAMPLE_CHARS = 8 << 20
# What fsspec's file systems call a file's version, hash and times of change.
_VERSION_KEYS = ("VersionId", "version_id", "generation", "ETag", "etag", "md5Hash", "content_md5", "LastModified",
                 "last_modified", "mtime", "updated", "modified", "created", "ino")  # fmt: skip
_END_BYTES = 64 << 10  # of each end of a file, hashed


@dataclass(frozen=True, slots=True)
class InputChunk:
    """Some rows of a data set."""

    name: str  # of the file
    offset: int  # ordinal of the file's first row
    chunk: Chunk
    typed: bool  # whether all values are known to be of the schema's types


class Input(Protocol):
    """What `Source` reads."""

    name: str
    openai_batch: bool
    schema: pa.Schema
    columns: list[tuple[str, list[str]]]
    """The columns of each file that states them, and of what was sampled of the others."""

    def num_rows(self) -> int | None:
        """Rows, where metadata tells without reading them."""

    read_log: ReadLog
    """What `read` has read."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells other data sets apart without reading them."""

    def versions(self) -> list[str | None]:
        """Of each file what its storage calls its version, or when it was changed; None where it knows neither."""

    def find_change(self, extents: Sequence[Extent], before: Sequence[str | None] | None) -> str | None:
        """The file that is not what it was when these extents were read, and where it differs. Files in a store whose
        version is the one `before` are not read again."""

    def read(self, wanted: Wanted, columns: list[str] | None, limit: int) -> Iterator[InputChunk]:
        """The wanted ones of the first `limit` rows, in order; at least the given columns of them."""


class FileInput:
    """Files, read one after another. CSV columns named in `as_text` are strings whatever they look like."""

    def __init__(self, files: Sequence[DataFile], as_text: Collection[str] = ()) -> None:
        self._files = files
        self.read_log = ReadLog()
        self.name = files[0].name
        self.openai_batch = files[0].format is DataFormat.openai_batch
        for file in files:
            if (file.format is DataFormat.openai_batch) is not self.openai_batch:
                raise BatchmixError(f"{file.name}: OpenAI batch files cannot be mixed with others ({self.name})")
        self._stated: dict[DataFile, pa.Schema] = {}
        self.columns: list[tuple[str, list[str]]] = []
        if self.openai_batch:
            self.schema = OPENAI_SCHEMA
            self.columns.append((self.name, OPENAI_SCHEMA.names))
            return
        merged = _Merged()
        pools = {form: [file for file in files if file.format is form] for form in _TEXT_FORMATS}
        for file, stated in zip(files, in_parallel(stated_schema, files), strict=True):
            if stated is not None:
                stated = pa.schema([field.with_type(plain(field.type)).remove_metadata() for field in stated])
                self._stated[file] = stated
                self.columns.append((file.name, stated.names))
                merged.add(file.name, stated, stated=True)
            elif file is pools[file.format][0]:
                merged.add(file.name, self._infer(pools[file.format], as_text), stated=False)
        self.schema = settle(merged.schema())
        self._add_partitions()

    def _add_partitions(self) -> None:
        """The columns that folders called name=value state: integers where all values are, else text."""
        values: dict[str, list[dict[str, Any]]] = {}
        for file in self._files:
            for name, value in file.partition:
                values.setdefault(name, []).append({name: value})
        for name, found in values.items():
            kind = infer_csv_schema(found, ()).field(0).type
            field = pa.field(name, kind if kind == pa.int64() else pa.string())
            index = self.schema.get_field_index(name)
            self.schema = self.schema.append(field) if index < 0 else self.schema.set(index, field)
        self.columns = [(file, list(dict.fromkeys([*names, *values]))) for file, names in self.columns]

    def _infer(self, files: Sequence[DataFile], as_text: Collection[str]) -> pa.Schema:
        """The schema of files of one format."""
        if files[0].format is not DataFormat.csv:
            inferred = TEXT_SCHEMA if files[0].format is DataFormat.text else infer_schema(_sample(files))
            self.columns.append((files[0].name, inferred.names))
            return inferred
        headers = [(file.name, csv_header(file)) for file in files]
        self.columns += headers
        return infer_csv_schema(chain((dict.fromkeys(header) for _, header in headers), _sample(files)), as_text)

    def num_rows(self) -> int | None:
        counts = in_parallel(count_rows, self._files)
        return None if None in counts else sum(count or 0 for count in counts)

    def fingerprint(self) -> dict[str, Any]:
        return {"files": in_parallel(_fingerprint, self._files)}

    def versions(self) -> list[str | None]:
        return in_parallel(_version, self._files)

    def find_change(self, extents: Sequence[Extent], before: Sequence[str | None] | None) -> str | None:
        now = self.versions()
        known = before if before is not None and len(before) == len(now) else [None] * len(now)

        def change(number: int) -> str | None:
            file = self._files[number]
            if not _is_local(file) and known[number] is not None and known[number] == now[number]:
                return None
            where = find_change(number, file, extents)
            return None if where is None else f"{file.name} has changed {where}"

        numbers = sorted({extent.file for extent in extents if extent.file < len(self._files)})
        return next(filter(None, in_parallel(change, numbers)), None)

    def read(self, wanted: Wanted, columns: list[str] | None, limit: int) -> Iterator[InputChunk]:
        offset = 0
        for number, file in enumerate(self._files):
            if offset >= limit:
                return
            last = 0

            def of_file(start: int, stop: int, offset: int = offset) -> npt.NDArray[np.bool_]:
                nonlocal last
                last = max(last, stop)
                return wanted(offset + start, offset + stop)

            stated = self._stated.get(file)
            typed = stated is not None and all(self.schema.field(field.name).type == field.type for field in stated)
            watched = replace(file, watch=partial(self.read_log.watch, number))
            for chunk in read_chunks(watched, of_file, columns, limit - offset):
                for record in chunk.records if file.partition else ():
                    if isinstance(record, dict):
                        record.update(file.partition)
                self._parse_fields(chunk, None if file.format is DataFormat.csv else dict(file.partition))
                yield InputChunk(file.name, offset, chunk, typed)
            offset += last  # readers ask about every row, wanted or not

    def _parse_fields(self, chunk: Chunk, names: Collection[str] | None) -> None:
        """Texts of CSV fields and of folders' names as values of the columns' types, in place; None: of all columns."""
        kinds = {field.name: field.type for field in self.schema
                 if field.type != pa.string() and (names is None or field.name in names)}  # fmt: skip
        if not kinds:
            return
        for record in chunk.records:
            if isinstance(record, dict):
                for name in kinds.keys() & record.keys():
                    if (text := record[name]) is not None:
                        record[name] = parse_field(text, kinds[name])


class _Merged:
    """The columns of several files, in order of appearance."""

    def __init__(self) -> None:
        self._fields: dict[str, pa.Field] = {}
        self._origins: dict[str, tuple[str, bool]] = {}

    def add(self, file: str, schema: pa.Schema, *, stated: bool) -> None:
        """BatchmixError for a name that stands twice, or a column of which two files state types that do not go
        together; what is only inferred from text becomes JSON text instead.
        """
        for field in schema:
            if schema.names.count(field.name) > 1:
                raise BatchmixError(f"{file}: has two columns {field.name!r}")
            if field.name not in self._fields:
                self._fields[field.name], self._origins[field.name] = field, (file, stated)
                continue
            old, (origin, origin_stated) = self._fields[field.name], self._origins[field.name]
            united = _unite(old, field)
            if united is None:
                if stated or origin_stated:
                    raise BatchmixError(f"{file}: column {field.name!r} is {_type_name(field)}, but {_type_name(old)} "
                                        f"in {origin}")  # fmt: skip
                united = loose(field.name)
            self._fields[field.name] = united
            self._origins[field.name] = (origin, stated or origin_stated)

    def schema(self) -> pa.Schema:
        return pa.schema(list(self._fields.values()))


def _unite(one: pa.Field, other: pa.Field) -> pa.Field | None:
    """The column that holds the values of both, or None."""
    if one.type == other.type and one.metadata == other.metadata:
        return one
    if LOOSE in (one.metadata, other.metadata):
        return None
    try:
        return pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive").field(0)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _type_name(field: pa.Field) -> str:
    return "of several types" if field.metadata == LOOSE else str(field.type)


def _sample(files: Iterable[DataFile]) -> Iterator[dict[str, Any]]:
    """The first records; BatchmixError where there are rows and none of them can be read."""
    rows = good = size = 0
    first_bad = ""
    for file, number, record in islice(_all_records(files), _SAMPLE_ROWS):
        rows += 1
        if isinstance(record, BadRecord):
            first_bad = first_bad or f"{file.name}, row {number + 1}: {record.reason}"
            continue
        good += 1
        yield record
        size += len(str(record))
        if size > _SAMPLE_CHARS:
            return
    if first_bad and not good:
        others = f"; nor can another of the first {rows} rows be read" if rows > 1 else ""
        raise BatchmixError(first_bad + others)


def _all_records(files: Iterable[DataFile]) -> Iterator[tuple[DataFile, int, Record]]:
    for file in files:
        for chunk in read_chunks(file, everything):
            for number, record in zip(chunk.numbers, chunk.records, strict=True):
                yield file, number, record


def _fingerprint(file: DataFile) -> dict[str, Any]:
    with file.open(raw=True) as opened, file.reading():
        head = opened.read(_END_BYTES)
        size = opened.seek(0, 2)
        opened.seek(max(0, size - _END_BYTES))
        digest = hashlib.sha256(head + opened.read(_END_BYTES)).hexdigest()
    found = {"name": file.name.rsplit("/", 1)[-1], "bytes": size, "sha256_ends": digest[:32]}
    return found | ({"partition": dict(file.partition)} if file.partition else {})


def _is_local(file: DataFile) -> bool:
    protocol = file.filesystem.protocol
    return bool({"file", "local"} & ({protocol} if isinstance(protocol, str) else set(protocol)))


def _version(file: DataFile) -> str | None:
    with file.reading():
        info = file.filesystem.info(file.path)
    found = [str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None]
    return " ".join(found) or None
