"""The formats of part files: how each is written, and what of it can be read back.

What is in a part file is called its records: a table, or a list of JSON lines.
"""

from __future__ import annotations

import base64
import datetime
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchmix.errors import BatchmixError
from batchmix.input import strict_json
from batchmix.output.columns import OutputColumns
from batchmix.output.config import OutputFormat
from batchmix.output.logprobs import TokenTexts
from batchmix.output.openai_response import first_choice, response_keys, response_line
from batchmix.records import Completion
from batchmix.storage import Storage

_BATCH_ROWS = 1024  # rows of a record batch or row group: what a reader decompresses at once


@dataclass(frozen=True)
class Keys:
    """What identifies and measures the records of one part file, in their order."""

    row: npt.NDArray[np.int64]
    sample: npt.NDArray[np.int32]
    finish_reason: pa.Array  # string
    prompt_tokens: npt.NDArray[np.int32]
    completion_tokens: npt.NDArray[np.int32]
    samples: npt.NDArray[np.int32]  # in this record: 1, but for OpenAI responses

    def __len__(self) -> int:
        return len(self.row)


class PartFormat(Protocol):
    """One output format."""

    extension: str

    def records(self, completions: Sequence[Completion]) -> Any:
        """Completions as records. Those of one row stand side by side, in the order of their samples."""

    def write(self, file: IO[bytes], records: Any) -> None: ...

    def write_empty(self, file: IO[bytes]) -> None:
        """A file without records, which readers take among others."""

    def keys(self, storage: Storage, name: str) -> Keys: ...

    def schema(self, storage: Storage, name: str) -> pa.Schema | None:
        """What the file itself says of its columns; None of lines, which say nothing."""

    def batches(self, storage: Storage, name: str, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The file's records, a batch at a time; of tables, these columns alone are decoded, in the file's order."""

    def take(self, records: Any, places: npt.NDArray[np.int64]) -> Any:
        """The records at these places, in this order."""

    def join(self, pieces: Sequence[Any]) -> Any: ...


class _Tables:
    """Formats whose records are an Arrow table."""

    def __init__(self, columns: OutputColumns, compression: str | None) -> None:
        self._columns = columns
        self._compression = compression

    def records(self, completions: Sequence[Completion]) -> pa.Table:
        return self._columns.table(completions)

    def take(self, records: pa.Table, places: npt.NDArray[np.int64]) -> pa.Table:
        return records.take(pa.array(places))

    def join(self, pieces: Sequence[pa.Table]) -> pa.Table:
        return pa.concat_tables(pieces)


_KEY_COLUMNS = {
    "row": pa.int64(),
    "sample_index": pa.int32(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int32(),
    "completion_tokens": pa.int32(),
}


class ArrowParts(_Tables):
    """Arrow IPC file format."""

    extension = "arrow"

    def write(self, file: IO[bytes], records: pa.Table) -> None:
        options = pa.ipc.IpcWriteOptions(compression=self._compression)
        with pa.ipc.new_file(file, records.schema, options=options) as writer:
            writer.write_table(records, max_chunksize=_BATCH_ROWS)

    def write_empty(self, file: IO[bytes]) -> None:
        self.write(file, self._columns.schema.empty_table())

    def keys(self, storage: Storage, name: str) -> Keys:
        with storage.arrow_file(name) as source:
            return _keys(_arrow_reader(source, list(_KEY_COLUMNS)).read_all())

    def schema(self, storage: Storage, name: str) -> pa.Schema:
        with storage.open(name) as file:  # a few bytes of the end
            return pa.ipc.open_file(file).schema

    def batches(self, storage: Storage, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        with storage.arrow_file(name) as source:
            reader = _arrow_reader(source, columns)
            for index in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(index)])


class ParquetParts(_Tables):
    """Parquet."""

    extension = "parquet"

    def __init__(self, columns: OutputColumns, compression: str | None) -> None:
        super().__init__(columns, compression)
        try:
            self.write(io.BytesIO(), columns.schema.empty_table())
        except pa.ArrowNotImplementedError as error:
            raise BatchmixError(
                f"output.format=parquet: {error}; use arrow, or list the columns to keep in data.columns without it"
            ) from None

    def write(self, file: IO[bytes], records: pa.Table) -> None:
        pq.write_table(records, file, compression=self._compression or "none", row_group_size=_BATCH_ROWS)

    def write_empty(self, file: IO[bytes]) -> None:
        # Without a row group: `datasets` asks the first one for its size, which must not be 0.
        pq.ParquetWriter(file, self._columns.schema, compression=self._compression or "none").close()

    def keys(self, storage: Storage, name: str) -> Keys:
        with storage.arrow_file(name) as source:
            return _keys(pq.ParquetFile(source).read(columns=list(_KEY_COLUMNS)))

    def schema(self, storage: Storage, name: str) -> pa.Schema:
        with storage.open(name) as file:
            return pq.read_schema(file)

    def batches(self, storage: Storage, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        with storage.arrow_file(name) as source:
            for batch in pq.ParquetFile(source).iter_batches(_BATCH_ROWS, columns=columns):
                yield pa.Table.from_batches([batch])


class LineParts(ABC):
    """Formats whose records are lines of JSON, as bytes without their ends."""

    extension = "jsonl"

    def write(self, file: IO[bytes], records: list[bytes]) -> None:
        file.writelines(line + b"\n" for line in records)

    def write_empty(self, file: IO[bytes]) -> None:
        file.write(b"")  # a blank line is more than `datasets` takes

    @abstractmethod
    def rows(self, records: list[bytes]) -> list[dict[str, Any]]:
        """Their values by the names of the columns that the other formats have; what they lack is left out."""

    def schema(self, storage: Storage, name: str) -> None:
        return None

    def batches(self, storage: Storage, name: str, columns: Sequence[str] | None = None) -> Iterator[list[bytes]]:
        with storage.open(name) as file:
            while lines := file.readlines(1 << 20):
                yield [line.rstrip(b"\n") for line in lines]

    def take(self, records: list[bytes], places: npt.NDArray[np.int64]) -> list[bytes]:
        return [records[place] for place in places.tolist()]

    def join(self, pieces: Sequence[list[bytes]]) -> list[bytes]:
        return [line for piece in pieces for line in piece]


class JsonParts(LineParts):
    """One JSON object a line, with the columns that the other formats have."""

    def __init__(self, columns: OutputColumns) -> None:
        self._columns = columns

    def records(self, completions: Sequence[Completion]) -> list[bytes]:
        rows = self._columns.table(completions).to_pylist()
        return [strict_json.dumps(row, default=_as_json).encode() for row in rows]

    def rows(self, records: list[bytes]) -> list[dict[str, Any]]:
        return [json.loads(line) for line in records]

    def keys(self, storage: Storage, name: str) -> Keys:
        found = [row for lines in self.batches(storage, name) for row in self.rows(lines)]
        return _keys(
            pa.table({key: pa.array([line[key] for line in found], kind) for key, kind in _KEY_COLUMNS.items()})
        )


class OpenAIParts(LineParts):
    """Responses of the OpenAI batch API: one line a row, whose samples are its choices."""

    def __init__(self, model: str, tokens: TokenTexts | None = None) -> None:
        self._model, self._tokens = model, tokens or TokenTexts(None)

    def records(self, completions: Sequence[Completion]) -> list[bytes]:
        rows: dict[int, list[Completion]] = {}
        for completion in completions:
            rows.setdefault(completion.prompt.row, []).append(completion)
        return [
            strict_json.dumps(response_line(samples, self._model, self._tokens)).encode() for samples in rows.values()
        ]

    def rows(self, records: list[bytes]) -> list[dict[str, Any]]:
        return [first_choice(json.loads(line)) for line in records]

    def keys(self, storage: Storage, name: str) -> Keys:
        found = [response_keys(json.loads(line)) for lines in self.batches(storage, name) for line in lines]
        columns = zip(*found, strict=True) if found else [[]] * 5
        row, reason, prompt, completion, samples = columns
        return Keys(
            np.array(row, np.int64),
            np.zeros(len(row), np.int32),
            pa.array(reason, pa.string()),
            np.array(prompt, np.int32),
            np.array(completion, np.int32),
            np.array(samples, np.int32),
        )


def part_format(
    form: OutputFormat, columns: OutputColumns, compression: str | None, openai_model: str | None
) -> PartFormat:
    """The format that `output.format` names; JSON lines are OpenAI responses where `openai_model` is given."""
    if form is OutputFormat.arrow:
        return ArrowParts(columns, compression)
    if form is OutputFormat.parquet:
        return ParquetParts(columns, compression)
    return JsonParts(columns) if openai_model is None else OpenAIParts(openai_model, columns.tokens)


def _arrow_reader(source: pa.NativeFile, columns: Sequence[str] | None) -> pa.ipc.RecordBatchFileReader:
    reader = pa.ipc.open_file(source)
    if columns is None:
        return reader
    fields = [reader.schema.names.index(name) for name in columns]
    return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields))


def _keys(table: pa.Table) -> Keys:
    return Keys(
        table["row"].to_numpy(),
        table["sample_index"].to_numpy(),
        pc.cast(table["finish_reason"], pa.string()).combine_chunks(),
        table["prompt_tokens"].to_numpy(),
        table["completion_tokens"].to_numpy(),
        np.ones(len(table), np.int32),
    )


def _as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)
