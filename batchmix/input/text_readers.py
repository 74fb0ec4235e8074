"""Readers of JSON lines, CSV and plain text. Rows that are not wanted are counted and not parsed (JSON) or not kept (CSV)."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from batchmix.errors import BatchmixError
from batchmix.input.chunk import BadRecord, Chunk, Record, Wanted, wanted_places
from batchmix.input.data_file import DataFile
from batchmix.input.schema import is_unicode

TEXT_SCHEMA = pa.schema([("prompt", pa.string())])  # of plain text
MAX_LINE_BYTES = 64 << 20
_BLOCK_BYTES = 256 << 10  # read at a time; the lines that end in a block are one chunk
_CSV_ROWS = 1024
_CSV_CHARS = 1 << 20
_BOM = b"\xef\xbb\xbf"
_UTF8 = "utf-8"
_JSON_NAMES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
_decode_json = json.JSONDecoder().raw_decode  # half the time of json.loads: no search for white space


def read_json_lines(file: DataFile, wanted: Wanted, limit: int) -> Iterator[Chunk]:
    """The wanted ones of the first `limit` lines; blank lines do not count."""
    return _read_lines(file, wanted, limit, _parse_json)


def read_text_lines(file: DataFile, wanted: Wanted, limit: int) -> Iterator[Chunk]:
    """The same of a text file, each line in a column `prompt`."""
    return _read_lines(file, wanted, limit, lambda text: {TEXT_SCHEMA.names[0]: text.removesuffix("\r")})


def _read_lines(file: DataFile, wanted: Wanted, limit: int, parse: Callable[[str], Record]) -> Iterator[Chunk]:
    start = 0
    for lines in _line_blocks(file):
        if places := wanted_places(wanted, start, len(lines)):
            records = []
            for place in places:
                records.append(_parse(lines[place], parse))
                lines[place] = None  # a line of many MB is not held beside what it says
            yield Chunk([start + place for place in places], records)
            del records
        start += len(lines)
        if start >= limit:
            return


def _line_blocks(file: DataFile) -> Iterator[list[bytes | None]]:
    """The file's lines that are not blank, without their ends, in lists; None for one over MAX_LINE_BYTES."""
    pending: list[bytes] = []  # the pieces of a line whose end is not read yet
    size = rows = 0  # bytes of that line, of which no more than MAX_LINE_BYTES are held
    bom = _BOM
    with file.open() as opened:
        while True:
            with file.reading(rows):
                block = opened.read(_BLOCK_BYTES)
            head, newline, rest = block.removeprefix(bom).partition(b"\n")
            bom = b""
            size += len(head)
            pending.append(head)
            if size > MAX_LINE_BYTES:
                pending.clear()
            if block and not newline:
                continue
            lines: list[bytes | None] = [b"".join(pending) if size <= MAX_LINE_BYTES else None, *rest.split(b"\n")]
            last = lines.pop() if newline else b""
            pending, size = [last or b""], len(last or b"")
            if lines := [line for line in lines if line is None or (line and not line.isspace())]:
                yield lines
            rows += len(lines)
            if not block:
                return


def _parse(line: bytes | None, parse: Callable[[str], Record]) -> Record:
    if line is None:
        return BadRecord(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return BadRecord(f"the line is no UTF-8: {error.reason} at byte {error.start + 1}")
    return parse(text)


def _parse_json(text: str) -> Record:
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        return BadRecord(f"the line is no JSON: {error.msg} at character {error.pos + 1}")
    except ValueError as error:  # an integer of thousands of digits
        return BadRecord(f"the line cannot be read: {error}")
    except RecursionError:
        return BadRecord("the line is no JSON that can be read: it is nested too deeply")
    if not isinstance(value, dict):
        return BadRecord(f"the line holds a JSON {_JSON_NAMES[type(value)]}, not an object")
    return value


def _loads(text: str) -> Any:
    try:
        value, end = _decode_json(text)
    except ValueError:
        return json.loads(text)  # white space before the value, or an error, which this one names rightly
    return value if end == len(text) or text[end:].isspace() else json.loads(text)


def csv_header(file: DataFile) -> list[str]:
    """The column names of a CSV file; BatchmixError where a name is not UTF-8 or stands there twice."""
    with file.open() as opened:
        return _header(file, _CsvRows(file, opened))


def read_csv(file: DataFile, wanted: Wanted, limit: int) -> Iterator[Chunk]:
    """The wanted ones of the first `limit` rows, every value as text and None where it is empty."""
    start = 0
    with file.open() as opened:
        reader = _CsvRows(file, opened)
        header = _header(file, reader)
        while start < limit:
            with file.reading(start):
                rows = reader.chunk()
            if not rows:
                return
            if places := wanted_places(wanted, start, len(rows)):
                encoding = file.encoding or _UTF8
                records = [_csv_record(header, rows[place], encoding) for place in places]
                yield Chunk([start + place for place in places], records)
            start += len(rows)


class _CsvRows:
    """The rows of a CSV file, of which no more than MAX_LINE_BYTES characters are held."""

    def __init__(self, file: DataFile, opened: Any) -> None:
        csv.field_size_limit(MAX_LINE_BYTES)
        encoding = file.encoding or _UTF8
        # The byte order mark is no part of the first name.
        encoding = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        self._text = io.TextIOWrapper(opened, encoding, errors="surrogateescape", newline="")
        self._size = 0  # characters of the row that is being read
        self._rows = csv.reader(self, delimiter=file.delimiter, strict=True)

    def __iter__(self) -> _CsvRows:
        return self

    def __next__(self) -> str:
        """The next line, for csv.reader, which an error makes begin anew with the line after it."""
        line = self._text.readline(MAX_LINE_BYTES + 1)
        self._size += len(line)
        if self._size > MAX_LINE_BYTES:
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(_CSV_CHARS)
            raise csv.Error(f"it is longer than {MAX_LINE_BYTES >> 20} Mi characters")
        if not line:
            raise StopIteration
        return line

    def row(self) -> list[str] | BadRecord | None:
        """The next row that is not blank; None at the end."""
        while True:
            self._size = 0
            try:
                row = next(self._rows, None)
            except csv.Error as error:
                return BadRecord(f"the row is no CSV: {error}")
            if row is None or row:
                return row

    def chunk(self) -> list[list[str] | BadRecord]:
        """The next thousand rows or million characters; empty at the end."""
        rows: list[list[str] | BadRecord] = []
        size = 0
        while len(rows) < _CSV_ROWS and size < _CSV_CHARS:
            row = self.row()
            if row is None:
                break
            rows.append(row)
            size += 0 if isinstance(row, BadRecord) else sum(map(len, row))
        return rows


def _header(file: DataFile, reader: _CsvRows) -> list[str]:
    with file.reading():
        header = reader.row() or []
    if isinstance(header, BadRecord):
        raise BatchmixError(f"{file.name}: cannot be read ({header.reason})")
    for name in header:
        if not is_unicode(name):
            number, encoding = header.index(name) + 1, _encoding_name(file.encoding or _UTF8)
            raise BatchmixError(f"{file.name}: the name of column {number} is no {encoding}; set data.csv_encoding")
        if header.count(name) > 1:
            raise BatchmixError(f"{file.name}: column {name!r} stands twice in the header")
    return header


def _encoding_name(encoding: str) -> str:
    return "UTF-8" if encoding == _UTF8 else encoding


def _csv_record(header: list[str], row: list[str] | BadRecord, encoding: str) -> Record:
    if isinstance(row, BadRecord):
        return row
    if len(row) != len(header):
        return BadRecord(f"the row has {len(row)} fields, the header {len(header)}")
    if not is_unicode("".join(row)):
        return BadRecord(f"the row is no {_encoding_name(encoding)}")
    return {name: value or None for name, value in zip(header, row, strict=True)}
