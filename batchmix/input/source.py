"""The source stage: files, folders, globs, URLs and hub data sets as one stream of rows with stable ordinals."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchmix.errors import BatchmixError
from batchmix.input.arrow_readers import can_be_kept
from batchmix.input.chunk import BadRecord
from batchmix.input.config import DataConfig, ShardConfig
from batchmix.input.find_files import find_files
from batchmix.input.formats import guess_format
from batchmix.input.hub import HubInput
from batchmix.input.input_files import FileInput, Input, InputChunk
from batchmix.input.openai_batch import read_request
from batchmix.input.prompt_columns import PromptColumns, column_of, value_of_column
from batchmix.input.read_log import Extent
from batchmix.input.rowset import Skip
from batchmix.input.schema import LOOSE, Conformer, is_unicode, short
from batchmix.records import InputRow
from batchmix.redact import remember_url
from batchmix.templates.template import RowTemplate

_IDS = ("id", "custom_id", "uuid")  # columns that fill the output's id where data.id_column names none
_LISTED = 30  # columns that an error message names


def check_apart(data: DataConfig, folder: str, part: str = "part-00000-000000.arrow") -> None:
    """BatchmixError where what is written into `folder` (the output's) would be read: by the next run, or while
    output.overwrite deletes it. `part`: how a file of it is called.
    """
    remote = "://" in folder.removeprefix("file://")
    written = Path(folder.removeprefix("file://")).resolve() / part
    for path in _paths(data.path):
        read = Path(path.removeprefix("file://")).expanduser()
        if remote or "://" in str(read):
            # Of a URL: a folder of it, or a pattern.
            address = f"{folder.rstrip('/')}/{part}"
            within = address.startswith(f"{path.rstrip('/')}/")
            inside = within or re.match(fsspec.utils.glob_translate(path), address) is not None
        elif read.is_dir():
            inside = written.is_relative_to(read.resolve())
        elif read.is_file():
            inside = read.resolve().parent == written.parent and read.match("part-*")
        else:
            pattern = fsspec.utils.glob_translate(str(read.parent.resolve() / read.name))
            inside = re.match(pattern, str(written)) is not None
        if inside:
            raise BatchmixError(f"output.dir={folder} lies in data.path={path}, where it would be read as data; choose"
                                " another output.dir")  # fmt: skip


def open_source(data: DataConfig, shard: ShardConfig, usual_ids: bool = True) -> Source:
    """Find the data set, check that it can be read as configured, and infer its columns; reads no more than a sample.

    `usual_ids`: whether a column that is called as ids usually are is one where data.id_column names none.
    """
    paths = _paths(data.path)
    if len(paths) == 1 and _is_hub_name(paths[0]):
        return Source(data, shard, HubInput(paths[0], data.split), usual_ids)
    # Numbers in these stay the text that they are: they are for the model, or identify the row.
    as_text = {*PromptColumns.of(data).names, "sampling", data.id_column or "", data.system_prompt_column or ""}
    return Source(data, shard, FileInput(find_files(paths, data), as_text), usual_ids)


def _paths(path: Any) -> list[str]:
    """data.path, which may be one or many, as a list."""
    paths = [path] if isinstance(path, str | os.PathLike) else path
    if not isinstance(paths, Sequence) or not all(isinstance(item, str | os.PathLike) and str(item) for item in paths):
        raise BatchmixError(f"data.path={path}: must be a file, folder, glob, URL or data set, or a list of them")
    if not paths:
        raise BatchmixError("data.path=[]: give at least one file, folder, glob, URL or data set")
    for item in paths:
        remember_url(str(item))  # what stores raise names paths without the scheme
    return [str(item) for item in paths]


class Source:
    """A data set, open for reading.

    `schema`: the columns that the output keeps, with their types, in input order. `num_rows`: of the whole data set,
    up to data.limit, where metadata tells or all have been read; else None. `id_column`: fills the rows' ids; None where
    ordinals do, or the custom_id of OpenAI batch files.
    """

    def __init__(self, data: DataConfig, shard: ShardConfig, source: Input, usual_ids: bool = True) -> None:
        self._data = data
        self._shard = shard
        self._input = source
        self.openai_batch = source.openai_batch
        known = source.schema.names
        needed = self._check_columns()
        self.id_column = data.id_column
        if data.id_column is None and usual_ids and not self.openai_batch:
            self.id_column = next((name for name in _IDS if name in known and _is_id(source.schema.field(name))), None)
            needed |= {self.id_column or ""}
        kept = known if data.columns is None else list(dict.fromkeys(data.columns))
        self.schema = pa.schema([source.schema.field(name) for name in kept])
        for field in self.schema:
            if not can_be_kept(field.type):
                raise BatchmixError(f"{source.name}: column {field.name!r} is {field.type}, which the output cannot hold; "
                                    "list the columns to keep in data.columns without it")  # fmt: skip
        self._read_columns = None if data.columns is None else [name for name in known if name in {*kept, *needed}]
        total = source.num_rows()
        self.num_rows = total if total is None or data.limit is None else min(total, data.limit)
        self._conformer = Conformer(self.schema, known)

    @property
    def shard_rows(self) -> int | None:
        """Rows of this shard, where metadata tells."""
        if self.num_rows is None:
            return None
        return len(range(self._shard.index, self.num_rows, self._shard.count))

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data: names, sizes and a hash of each file's ends."""
        return self._input.fingerprint()

    def versions(self) -> list[str | None]:
        """What storage calls each file's version, or when it was changed."""
        return self._input.versions()

    def new_extents(self) -> list[Extent]:
        """What was read of the files since the last call."""
        return self._input.read_log.take()

    def find_change(self, extents: Sequence[Extent], before: Sequence[str | None] | None) -> str | None:
        """The file whose bytes are not those of these extents, and where; files in a store of the version `before` pass."""
        return self._input.find_change(extents, before)

    def rows(self, done: Skip) -> Iterator[InputRow]:
        """This shard's rows that are not done, in order.

        A row's ordinal counts all rows of all files in order; blank lines of JSONL and CSV files are not rows. Rows of
        other shards and rows that are done are not decoded where the format allows, and nothing is read beyond
        data.limit.
        """
        limit = sys.maxsize if self._data.limit is None else self._data.limit
        end = 0

        def wanted(start: int, stop: int) -> npt.NDArray[np.bool_]:
            nonlocal end
            end = max(end, stop)  # readers ask about every row
            mine: npt.NDArray[np.bool_] = ~done.mask(start, stop)
            if self._shard.count > 1:
                mine &= np.arange(start, stop) % self._shard.count == self._shard.index
            mine[max(0, limit - start) :] = False
            return mine

        for chunk in self._input.read(wanted, self._read_columns, limit):
            rows = self._rows(chunk)
            if not chunk.typed:
                self._conformer.check(rows)
            yield from rows
        self.num_rows = min(end, limit)

    def _rows(self, chunk: InputChunk) -> list[InputRow]:
        id_column = self.id_column
        set_id = _set_id if self._data.id_column is not None else _set_usual_id
        rows = []
        for place, record in zip(chunk.chunk.numbers, chunk.chunk.records, strict=True):
            number = chunk.offset + place
            if isinstance(record, BadRecord):
                row = InputRow(number, str(number), {}, None, f"{chunk.name}, row {place + 1}: {record.reason}")
            elif self.openai_batch:
                row = read_request(number, record)
            else:
                row = InputRow(number, str(number), record)
                if id_column is not None:
                    set_id(row, id_column)
                if record.get("sampling") is not None:
                    _set_sampling(row, record["sampling"])
            rows.append(row)
        return rows

    def _check_columns(self) -> set[str]:
        """The columns that the job needs beside those it keeps; BatchmixError where one is not there."""
        data = self._data
        if self.openai_batch and data.id_column not in (None, "custom_id"):
            raise BatchmixError(
                f"data.id_column={data.id_column}: OpenAI batch files have their custom_id; leave it out"
            )
        for key, usual in (("messages_column", "messages"), ("prompt_column", None), ("token_ids_column", None)):
            if self.openai_batch and (name := getattr(data, key)) not in (None, usual):
                raise BatchmixError(f"data.{key}={name}: the requests of OpenAI batch files have their messages in "
                                    "body.messages; leave it out")  # fmt: skip
        for name in data.columns or ():
            _require(name, "data.columns", self._input.name, self._input.schema.names)
        prompts = PromptColumns.of(data)
        if data.template is not None and prompts.messages_or_prompt_named:
            raise BatchmixError("data.template says what the prompt is, and so does data.messages_column or "
                                "data.prompt_column; leave one of them out")  # fmt: skip
        templates = {key: RowTemplate(text, key, True) for key, text in (
            ("data.template", data.template), ("data.system_prompt", data.system_prompt or None),
        ) if text is not None}  # fmt: skip
        needed = {"sampling", *prompts.names}
        for file, names in self._input.columns:
            for key in ("id_column", "system_prompt_column", *PromptColumns.KEYS):
                if (name := getattr(data, key)) is not None:
                    self._require_field(name, f"data.{key}", file, names)
                    needed.add(column_of(name, names))
            for key, template in templates.items():
                variables = sorted(template.columns(names))
                needed |= set(variables)
                for name in variables:
                    _require(name, key, file, names)
            if data.template is None and not {column_of(name, names) for name in prompts.names} & set(names):
                raise BatchmixError(f"{file}: has none of the columns {', '.join(map(repr, prompts.names))}; name the "
                                    f"prompt's column in data.prompt_column or set data.template; its columns are "
                                    f"{_listed(names)}{_hint(prompts.names, names)}")  # fmt: skip
        return needed

    def _require_field(self, name: str, key: str, file: str, names: Sequence[str]) -> None:
        """BatchmixError where there is neither such a column nor, of `meta.text`, such a field."""
        column = column_of(name, names)
        _require(column, key, file, names)
        kind = self._input.schema.field(column).type
        for part in name.split(".")[1:] if column != name else ():
            if not pa.types.is_struct(kind):
                return  # what it holds is not known
            fields = {field.name: field.type for field in kind}
            _require(part, f"{key}={name}", f"{file}, column {column!r}", list(fields))
            kind = fields[part]


def _hint(wanted: Sequence[str], names: Sequence[str]) -> str:
    """What may be meant by columns none of which is there."""
    if separator := _separator(names):
        return separator
    if "conversations" in names:
        return "; of ShareGPT's conversations: data.messages_column=conversations"
    near = {match for name in wanted for match in difflib.get_close_matches(name, names, 1)}
    return f"; is it {' or '.join(map(repr, sorted(near)))}?" if near else ""


def _separator(names: Sequence[str]) -> str:
    """What may be meant by a CSV file of one column whose name has another separator in it."""
    found = [mark for mark in ";\t|" if len(names) == 1 and mark in names[0]]
    return f"; is it separated otherwise? data.csv_delimiter={found[0]!r}" if found else ""


def _require(name: str, key: str, file: str, names: Sequence[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        meant = [
            f"row[{match!r}]"
            if key in ("data.template", "data.system_prompt") and not match.isidentifier()
            else repr(match)
            for match in near
        ]
        hint = _separator(names) or (f"; did you mean {meant[0]}?" if meant else "")
        raise BatchmixError(f"{file}: no column {name!r} ({key}); it has {_listed(names)}{hint}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _set_id(row: InputRow, column: str) -> None:
    value = value_of_column(row.columns, column)
    name = str(value)
    if value is None:
        row.error = f"column {column!r} (data.id_column) is null"
    elif is_unicode(name):
        row.id = name
    else:
        row.error = f"column {column!r} (data.id_column) holds {short(value)}, which is no text"


def _is_id(field: pa.Field) -> bool:
    """Texts and integers, but no column of JSON text, whose values may be anything."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool((text and field.metadata != LOOSE) or pa.types.is_integer(kind))


def _set_usual_id(row: InputRow, column: str) -> None:
    """A row without an id keeps its ordinal, which keys the random numbers of all rows."""
    row.key = row.id
    value = row.columns.get(column)
    if isinstance(value, str | int) and not isinstance(value, bool) and is_unicode(str(value)):
        row.id = str(value)


def _set_sampling(row: InputRow, value: Any) -> None:
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):  # refused below as what it is, a string
            value = json.loads(value)
    if isinstance(value, list) and all(isinstance(item, tuple) for item in value):  # a column of Arrow maps
        value = dict(value)
    if isinstance(value, dict):
        row.sampling = value
    elif value is not None:
        row.error = row.error or f"column 'sampling' holds {short(value)}, not an object of sampling keys"


def _is_hub_name(path: str) -> bool:
    """Whether a path that is nothing here can only be meant for the hub."""
    if "://" in path or path.startswith(("/", ".", "~")) or any(char in path for char in "*?[") or guess_format(path):
        return False
    filesystem, place = fsspec.core.url_to_fs(path)
    return path.count("/") <= 1 and not filesystem.exists(place)
