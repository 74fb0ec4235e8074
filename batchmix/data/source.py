"""The source stage: files, folders, globs, URLs and hub data sets as one stream of rows with stable ordinals."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import jinja2
import jinja2.meta
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchmix.config import DataConfig, DataFormat, ShardConfig
from batchmix.data.formats import BadRecord, DataFile, Record, Wanted, check_magic, guess_format
from batchmix.data.openai_batch import OPENAI_SCHEMA, is_request, read_request
from batchmix.data.rowset import Skip
from batchmix.data.schema import Conformer, infer_schema
from batchmix.errors import BatchmixError
from batchmix.records import Row

_log = logging.getLogger(__name__)
_SAMPLE_ROWS = 10_000  # of the first text file, from which its columns' types are inferred
_SAMPLE_BYTES = 8 << 20
_CHUNK_ROWS = 1024


def open_source(data: DataConfig, shard: ShardConfig) -> Source:
    """Find the data set, check that it can be read as configured, and infer its columns; reads no more than a sample."""
    paths = [data.path] if isinstance(data.path, str) else list(data.path)
    if not paths:
        raise BatchmixError("data.path=[]: give at least one file, folder, glob, URL or data set")
    if len(paths) == 1 and _is_hub_name(paths[0]):
        return Source(data, shard, HubInput(paths[0], data.split))
    files = [file for path in paths for file in _find(path, data.format)]
    return Source(data, shard, FileInput(_detect_openai(files, data.format)))


class FileInput:
    """A list of files."""

    def __init__(self, files: list[DataFile]) -> None:
        self.files = files
        self.name = files[0].path
        self.openai_batch = files[0].format is DataFormat.openai_batch
        for file in files:
            check_magic(file)
            if (file.format is DataFormat.openai_batch) is not self.openai_batch:
                raise BatchmixError(f"{file.path}: OpenAI batch files cannot be mixed with others ({self.name})")

    def schema(self) -> pa.Schema:
        """The first file's; BatchmixError if another file states a column of another type."""
        if self.openai_batch:
            return OPENAI_SCHEMA
        stated = self.files[0].schema()
        schema = stated if stated is not None else infer_schema(self._sample())
        for file in self.files[1:]:
            for column in file.schema() or ():
                place = schema.get_field_index(column.name)
                if place >= 0 and schema.field(place).type != column.type:
                    raise BatchmixError(f"{file.path}: column {column.name!r} is {column.type}, but "
                                        f"{schema.field(place).type} in {self.name}")  # fmt: skip
        return schema

    def _sample(self) -> Iterator[dict[str, Any]]:
        size = 0
        for _, record in islice(
            self.files[0].read(lambda start, stop: np.ones(stop - start, bool), None), _SAMPLE_ROWS
        ):
            if isinstance(record, dict):
                yield record
                size += len(str(record))
                if size > _SAMPLE_BYTES:
                    return

    def num_rows(self) -> int | None:
        counts = [file.num_rows() for file in self.files]
        return None if None in counts else sum(count or 0 for count in counts)

    def fingerprint(self) -> dict[str, Any]:
        return {"files": [_fingerprint(file) for file in self.files]}

    def read(self, wanted: Wanted, columns: list[str] | None) -> Iterator[tuple[str, Record]]:
        """The wanted rows with their ordinals over all files, each with where it stands."""
        offset = 0
        for file in self.files:
            last = 0

            def of_file(start: int, stop: int, offset: int = offset) -> npt.NDArray[np.bool_]:
                nonlocal last
                last = max(last, stop)
                return wanted(offset + start, offset + stop)

            for number, record in file.read(of_file, columns):
                yield f"{file.path}, row {number + 1}", (offset + number, record)
            offset += last  # readers ask about every row, wanted or not


class HubInput:
    """A data set of the hub, streamed through `datasets`."""

    openai_batch = False

    def __init__(self, name: str, split: str) -> None:
        import datasets

        self.name, self.split = name, split
        try:
            self.stream = datasets.load_dataset(name, split=split, streaming=True)
        except Exception as error:  # datasets raises a different class for each of a dozen causes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BatchmixError(
                f"data.path={name}: no file or folder here, and the hub's data set cannot be opened ({reason})"
            ) from None

    def schema(self) -> pa.Schema:
        features = self.stream.features
        return features.arrow_schema if features is not None else infer_schema(islice(iter(self.stream), _SAMPLE_ROWS))

    def num_rows(self) -> int | None:
        splits = self.stream.info.splits or {}
        return splits[self.split].num_examples if self.split in splits else None

    def fingerprint(self) -> dict[str, Any]:
        return {"hub": self.name, "split": self.split, "version": str(self.stream.info.version)}

    def read(self, wanted: Wanted, columns: list[str] | None) -> Iterator[tuple[str, Record]]:
        for number, record in enumerate(self.stream):
            if wanted(number, number + 1)[0]:
                yield f"{self.name}, row {number + 1}", (number, record)


class Source:
    """A data set, open for reading. `schema`: the columns that the output keeps, with their types, in input order."""

    def __init__(self, data: DataConfig, shard: ShardConfig, source: FileInput | HubInput) -> None:
        self.data = data
        self.shard = shard
        self.input = source
        self.openai_batch = source.openai_batch
        full = source.schema()
        needed = self._check_columns(full)
        kept = full.names if data.columns is None else data.columns
        self.schema = pa.schema([full.field(name) for name in kept])
        self._read_columns = None if data.columns is None else [name for name in full.names if name in {*kept, *needed}]
        total = source.num_rows()
        self.num_rows = total if total is None or data.limit is None else min(total, data.limit)
        self._conformer = Conformer(self.schema, known=full.names)

    @property
    def shard_rows(self) -> int | None:
        """Rows of this shard, where metadata tells."""
        if self.num_rows is None:
            return None
        return len(range(self.shard.index, self.num_rows, self.shard.count))

    def check_apart_from(self, folder: Path) -> None:
        """BatchmixError where `folder` (the output's) lies in a folder that is read: the next run would read it too."""
        paths = [self.data.path] if isinstance(self.data.path, str) else self.data.path
        for path in paths:
            if "://" not in path and Path(path).is_dir() and folder.resolve().is_relative_to(Path(path).resolve()):
                raise BatchmixError(f"output.dir={folder} lies in data.path={path}, where it would be read as data")

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data: names, sizes and a hash of each file's ends."""
        return self.input.fingerprint()

    def rows(self, done: Skip) -> Iterator[Row]:
        """This shard's rows that are not done, in order.

        A row's ordinal counts all rows of all files in order; blank lines of JSONL and CSV files are not rows. Rows of
        other shards and rows that are done are not decoded where the format allows.
        """

        def wanted(start: int, stop: int) -> npt.NDArray[np.bool_]:
            mine: npt.NDArray[np.bool_] = np.arange(start, stop) % self.shard.count == self.shard.index
            mine &= ~done.mask(start, stop)
            if self.data.limit is not None:
                mine[max(0, self.data.limit - start) :] = False
            return mine

        records = self.input.read(wanted, self._read_columns)
        if self.data.limit is not None:
            limit = self.data.limit
            records = _until(records, limit)
        while chunk := list(islice(records, _CHUNK_ROWS)):
            rows = [self._row(where, number, record) for where, (number, record) in chunk]
            self._conformer.check(rows)
            yield from rows

    def _row(self, where: str, number: int, record: dict[str, Any] | BadRecord) -> Row:
        if isinstance(record, BadRecord):
            return Row(number, str(number), {}, error=f"{where}: {record.reason}")
        if self.openai_batch:
            return read_request(number, record)
        row = Row(number, str(number), record)
        if self.data.id_column is not None:
            value = record.get(self.data.id_column)
            if value is None:
                row.error = f"column {self.data.id_column!r} (data.id_column) is null"
            else:
                row.id = str(value)
        sampling = record.get("sampling")
        if isinstance(sampling, str):
            with suppress(ValueError):  # refused below as what it is, a string
                sampling = json.loads(sampling)
        if isinstance(sampling, dict):
            row.sampling = sampling
        elif sampling is not None:
            row.error = f"column 'sampling' holds a {type(sampling).__name__}, not an object of sampling keys"
        return row

    def _check_columns(self, schema: pa.Schema) -> set[str]:
        """The columns that the job needs beside those it keeps; BatchmixError where one is not there."""
        data, names = self.data, schema.names

        def require(name: str, key: str) -> None:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise BatchmixError(f"{self.input.name}: no column {name!r} ({key}); it has {', '.join(names)}{hint}")

        needed = {"sampling"}
        if self.openai_batch:
            return needed | set(names)
        if data.id_column is not None:
            require(data.id_column, "data.id_column")
            needed.add(data.id_column)
        for name in data.columns or ():
            require(name, "data.columns")
        if data.template is not None:
            for name in sorted(_template_variables(data.template)):
                require(name, "data.template")
                needed.add(name)
        prompts = {"data.token_ids_column": data.token_ids_column, "data.messages_column": data.messages_column,
                   "data.prompt_column": data.prompt_column}  # fmt: skip
        found = set(prompts.values()) & set(names)
        if not found and data.template is None:
            missing = ", ".join(f"{name!r} ({key})" for key, name in prompts.items())
            raise BatchmixError(f"{self.input.name}: has none of the columns {missing} and data.template is not set; "
                                f"its columns are {', '.join(names)}")  # fmt: skip
        return needed | found


def _until(records: Iterable[tuple[str, Record]], limit: int) -> Iterator[tuple[str, Record]]:
    """Records up to the ordinal `limit`. Readers still count what lies beyond, so the reading ends with this generator."""
    for where, (number, record) in records:
        if number >= limit:
            return
        yield where, (number, record)
        if number == limit - 1:
            return


def _template_variables(template: str) -> set[str]:
    try:
        return jinja2.meta.find_undeclared_variables(jinja2.Environment(autoescape=False).parse(template))
    except jinja2.TemplateSyntaxError as error:
        raise BatchmixError(f"data.template: {error.message} (line {error.lineno})") from None


def _is_hub_name(path: str) -> bool:
    """Whether a path that is nothing here can only be meant for the hub."""
    if "://" in path or path.startswith(("/", ".", "~")) or any(char in path for char in "*?[") or guess_format(path):
        return False
    filesystem, place = fsspec.core.url_to_fs(path)
    return path.count("/") <= 1 and not filesystem.exists(place)


def _find(path: str, wanted: DataFormat) -> list[DataFile]:
    """The files that one entry of data.path stands for, sorted."""
    try:
        filesystem, place = fsspec.core.url_to_fs(path, **({"auto_mkdir": False} if "://" not in path else {}))
        if any(char in place for char in "*?["):
            places = [match for match in filesystem.glob(place) if not filesystem.isdir(match)]
        elif filesystem.isdir(place):
            places = [match for match in filesystem.find(place) if _is_data(match[len(place) :])]
        elif filesystem.exists(place):
            places = [place]
        else:
            raise BatchmixError(f"data.path={path}: no such file or folder")
    except (OSError, ImportError, ValueError) as error:
        raise BatchmixError(f"data.path={path}: cannot be read ({str(error).splitlines()[0]})") from None
    local = "://" not in path
    files = []
    for match in sorted(places):
        form = guess_format(match) if wanted is DataFormat.auto else wanted
        if form is None:
            if len(places) > 1 and filesystem.isdir(place):
                continue  # a folder's README and the like
            raise BatchmixError(f"{match}: its name does not say what it is; set data.format "
                                f"({', '.join(form.value for form in DataFormat if form is not DataFormat.auto)})")  # fmt: skip
        files.append(DataFile(match if local else filesystem.unstrip_protocol(match), form))
    if not files:
        raise BatchmixError(f"data.path={path}: no data files there")
    return files


def _is_data(relative: str) -> bool:
    return not any(part.startswith(("_", ".")) for part in relative.strip("/").split("/"))


def _detect_openai(files: list[DataFile], wanted: DataFormat) -> list[DataFile]:
    """JSON-lines files, taken for OpenAI batch files where their first row is a batch request."""
    if wanted is not DataFormat.auto:
        return files
    found = []
    for file in files:
        if file.format is DataFormat.jsonl:
            check_magic(file)
            first = next(file.read(lambda start, stop: np.arange(start, stop) == 0, None), None)
            if first is not None and is_request(first[1]):
                file = DataFile(file.path, DataFormat.openai_batch)
        found.append(file)
    return found


def _fingerprint(file: DataFile) -> dict[str, Any]:
    with file.named(), file.open(raw=True) as opened:
        head = opened.read(65536)
        size = opened.seek(0, 2)
        opened.seek(max(0, size - 65536))
        digest = hashlib.sha256(head + opened.read(65536)).hexdigest()
    return {"name": file.path.rsplit("/", 1)[-1], "bytes": size, "sha256_ends": digest[:32]}
