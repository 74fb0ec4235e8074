"""Readers of one file each: which rows it has, and the wanted ones as Python objects, streamed.

A reader gets `wanted(start, stop)`, a bool array over the file's own row numbers, and yields `(number, columns)`, or
`(number, BadRecord)` where a record cannot be read. What is not wanted is not decoded where the format allows.
"""

from __future__ import annotations

import csv
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from batchmix.config import DataFormat
from batchmix.errors import BatchmixError

MAX_LINE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
_CHUNK_ROWS = 1024
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_EXTENSIONS = {
    ".jsonl": DataFormat.jsonl,
    ".ndjson": DataFormat.jsonl,
    ".json": DataFormat.jsonl,
    ".parquet": DataFormat.parquet,
    ".arrow": DataFormat.arrow,
    ".feather": DataFormat.arrow,
    ".csv": DataFormat.csv,
}
_DAMAGE = (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException)

Wanted = Callable[[int, int], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be read, and why, in one line."""

    reason: str


Record = tuple[int, dict[str, Any] | BadRecord]


@dataclass(frozen=True)
class DataFile:
    """One input file: a path or fsspec URL, and its format (never auto)."""

    path: str
    format: DataFormat

    @property
    def compression(self) -> str | None:
        return next((kind for suffix, kind in _COMPRESSION.items() if self.path.endswith(suffix)), None)

    def open(self, raw: bool = False) -> IO[bytes]:
        """The file's bytes, decompressed unless `raw`. The caller closes it."""
        opened: IO[bytes] = fsspec.open(self.path, "rb", compression=None if raw else self.compression).open()
        return opened

    @contextmanager
    def named(self, row: int = 0) -> Iterator[None]:
        """Turn what a damaged or vanished file raises into an error that names it."""
        try:
            yield
        except _DAMAGE as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BatchmixError(f"{self.path}: cannot be read past row {row} ({reason})") from None

    def read(self, wanted: Wanted, columns: list[str] | None) -> Iterator[Record]:
        """The wanted rows, in order. `columns` limits what column-wise formats decode."""
        if self.format is DataFormat.parquet:
            return _read_parquet(self, wanted, columns)
        if self.format is DataFormat.arrow:
            return _read_arrow(self, wanted, columns)
        if self.format is DataFormat.csv:
            return _read_csv(self, wanted)
        return _read_json_lines(self, wanted)

    def schema(self) -> pa.Schema | None:
        """The schema that the file itself states; None for text formats."""
        with self.named():
            if self.format is DataFormat.parquet:
                with self.open() as file:
                    return pq.read_schema(file)
            if self.format is DataFormat.arrow:
                with self.open() as file:
                    return _open_arrow(file).schema
        return None

    def num_rows(self) -> int | None:
        """Rows, where the file's metadata tells without reading it."""
        if self.format is not DataFormat.parquet:
            return None
        with self.named(), self.open() as file:
            return int(pq.ParquetFile(file).metadata.num_rows)


def guess_format(path: str) -> DataFormat | None:
    """The format that a file's extension stands for, a compression suffix set aside."""
    name = path.lower()
    for suffix in _COMPRESSION:
        name = name.removesuffix(suffix)
    return next((form for extension, form in _EXTENSIONS.items() if name.endswith(extension)), None)


def check_magic(file: DataFile) -> None:
    """BatchmixError if the first bytes say that the file is not of its format, or if it is empty."""
    with file.named():
        with file.open(raw=True) as raw:
            stored = raw.read(8)
        if not stored:
            raise BatchmixError(f"{file.path}: is empty")
        found = "gzip" if stored.startswith(b"\x1f\x8b") else "zstd" if stored.startswith(b"\x28\xb5\x2f\xfd") else None
        if found != file.compression:
            says = f"is {found}" if found else "is not compressed"
            raise BatchmixError(f"{file.path}: {says}, which its name does not say; rename it")
        with file.open() as opened:
            head = opened.read(65536)
    kind = _sniff(head)
    text = (DataFormat.jsonl, DataFormat.openai_batch, DataFormat.csv)
    if not head.strip():
        raise BatchmixError(f"{file.path}: is empty")
    if kind != (file.format.value if file.format not in text else "text"):
        raise BatchmixError(f"{file.path}: is not {file.format.value} but {kind}; rename it or set data.format")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if file.format in (DataFormat.jsonl, DataFormat.openai_batch) and start == b"[":
        raise BatchmixError(f"{file.path}: is one JSON array, not JSON lines; write one object a line")


def _sniff(head: bytes) -> str:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive"
    return "binary data" if b"\x00" in head else "text"


def _lines(file: DataFile) -> Iterator[bytes | None]:
    """The file's lines that are not blank, without their ends; None for one over MAX_LINE_BYTES."""
    with file.open() as opened:
        rest, overlong = b"", False
        first = True
        while block := opened.read(_BLOCK_BYTES):
            if first:
                block, first = block.removeprefix(b"\xef\xbb\xbf"), False
            *lines, rest = (rest + block).split(b"\n")
            if overlong and lines:
                lines[0], overlong = b"", False
            for line in lines:
                if line and not line.isspace():
                    yield line
            if len(rest) > MAX_LINE_BYTES:
                if not overlong:
                    yield None
                rest, overlong = b"", True
        if rest.strip() and not overlong:
            yield rest


def _chunks(file: DataFile, records: Iterable[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Records in lists of up to _CHUNK_ROWS, each with the number of its first."""
    start = 0
    chunk: list[Any] = []
    iterator = iter(records)
    while True:
        with file.named(start + len(chunk)):
            record = next(iterator, file)  # the file stands for "no more"
        if record is not file:
            chunk.append(record)
        if len(chunk) == _CHUNK_ROWS or (record is file and chunk):
            yield start, chunk
            start, chunk = start + len(chunk), []
        if record is file:
            return


def _read_json_lines(file: DataFile, wanted: Wanted) -> Iterator[Record]:
    for start, lines in _chunks(file, _lines(file)):
        for place in np.flatnonzero(wanted(start, start + len(lines))).tolist():
            yield start + place, _parse(lines[place])


def _parse(line: bytes | None) -> dict[str, Any] | BadRecord:
    if line is None:
        return BadRecord(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRecord(f"the line is no JSON: {error.msg} at character {error.pos + 1}")
    except UnicodeDecodeError as error:
        return BadRecord(f"the line is no UTF-8: {error.reason} at byte {error.start + 1}")
    except RecursionError:
        return BadRecord("the line is no JSON that can be read: it is nested too deeply")
    except ValueError as error:  # an integer of thousands of digits
        return BadRecord(f"the line cannot be read: {error}")
    return (
        value if isinstance(value, dict) else BadRecord(f"the line holds a JSON {type(value).__name__}, not an object")
    )


def _read_csv(file: DataFile, wanted: Wanted) -> Iterator[Record]:
    with file.open() as opened:
        csv.field_size_limit(MAX_LINE_BYTES)
        reader = csv.reader(io.TextIOWrapper(opened, "utf-8-sig", errors="surrogateescape", newline=""))
        header = next(reader)
        for start, rows in _chunks(file, (row for row in reader if row)):
            for place in np.flatnonzero(wanted(start, start + len(rows))).tolist():
                yield start + place, _csv_record(header, rows[place])


def _csv_record(header: list[str], row: list[str]) -> dict[str, Any] | BadRecord:
    if len(row) != len(header):
        return BadRecord(f"the row has {len(row)} fields, the header {len(header)}")
    if any("\udc80" <= char <= "\udcff" for field in row for char in field if char >= "\ud800"):
        return BadRecord("the row is no UTF-8")
    return {name: value or None for name, value in zip(header, row, strict=True)}


def _read_parquet(file: DataFile, wanted: Wanted, columns: list[str] | None) -> Iterator[Record]:
    start = 0
    with file.open() as opened:
        with file.named():
            parquet = pq.ParquetFile(opened)
        present = None if columns is None else [name for name in columns if name in parquet.schema_arrow.names]
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if wanted(start, start + rows).any():
                batches = parquet.iter_batches(_CHUNK_ROWS, row_groups=[group], columns=present)
                yield from _batch_records(file, batches, start, wanted)
            start += rows


def _open_arrow(file: IO[bytes]) -> Any:
    """A reader of Arrow's file format, or of its stream format, whichever the bytes are."""
    magic = file.read(6)
    file.seek(0)
    return pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)


def _read_arrow(file: DataFile, wanted: Wanted, columns: list[str] | None) -> Iterator[Record]:
    with file.open() as opened:
        with file.named():
            reader = _open_arrow(opened)
        if isinstance(reader, pa.RecordBatchFileReader):
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(reader)
        yield from _batch_records(file, batches, 0, wanted, columns)


def _batch_records(
    file: DataFile, batches: Iterator[Any], start: int, wanted: Wanted, columns: list[str] | None = None
) -> Iterator[Record]:
    """The wanted rows of Arrow batches whose first row is `start`, made into Python objects a thousand at a time."""
    while True:
        with file.named(start):
            batch = next(batches, None)
        if batch is None:
            return
        if columns is not None:
            batch = batch.select([name for name in columns if name in batch.schema.names])
        places = np.flatnonzero(wanted(start, start + batch.num_rows))
        for low in range(0, len(places), _CHUNK_ROWS):
            part = places[low : low + _CHUNK_ROWS]
            yield from zip((start + part).tolist(), batch.take(pa.array(part)).to_pylist(), strict=True)
        start += batch.num_rows
