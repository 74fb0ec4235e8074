"""Readers of JSON lines and CSV. Rows that are not wanted are counted and not parsed (JSON) or not kept (CSV)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from batchmix.data.chunk import BadRecord, Chunk, Record, Wanted, wanted_places
from batchmix.data.data_file import DataFile
from batchmix.data.schema import is_unicode
from batchmix.errors import BatchmixError

MAX_LINE_BYTES = 64 << 20
_BLOCK_BYTES = 256 << 10  # read at a time; the lines that end in a block are one chunk
_CSV_ROWS = 1024
_CSV_CHARS = 1 << 20
_BOM = b"\xef\xbb\xbf"
_JSON_NAMES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
_decode_json = json.JSONDecoder().raw_decode  # half the time of json.loads: no search for white space


def read_json_lines(file: DataFile, wanted: Wanted, limit: int) -> Iterator[Chunk]:
    """The wanted ones of the first `limit` lines; blank lines do not count."""
    start = 0
    for lines in _line_blocks(file):
        if places := wanted_places(wanted, start, len(lines)):
            yield Chunk([start + place for place in places], [_parse(lines[place]) for place in places])
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


def _parse(line: bytes | None) -> Record:
    if line is None:
        return BadRecord(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return BadRecord(f"the line is no UTF-8: {error.reason} at byte {error.start + 1}")
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
        return _header(file, _csv_reader(opened))


def read_csv(file: DataFile, wanted: Wanted, limit: int) -> Iterator[Chunk]:
    """The wanted ones of the first `limit` rows, every value as text and None where it is empty."""
    start = 0
    with file.open() as opened:
        reader = _csv_reader(opened)
        header = _header(file, reader)
        while start < limit:
            with file.reading(start):
                rows = _csv_rows(reader)
            if not rows:
                return
            if places := wanted_places(wanted, start, len(rows)):
                yield Chunk([start + place for place in places], [_csv_record(header, rows[place]) for place in places])
            start += len(rows)


def _csv_reader(opened: Any) -> Any:
    csv.field_size_limit(MAX_LINE_BYTES)
    return csv.reader(io.TextIOWrapper(opened, "utf-8-sig", errors="surrogateescape", newline=""), strict=True)


def _header(file: DataFile, reader: Any) -> list[str]:
    with file.reading():
        header: list[str] = next((row for row in reader if row), [])
    for name in header:
        if not is_unicode(name):
            raise BatchmixError(f"{file.name}: the name of column {header.index(name) + 1} is no UTF-8")
        if header.count(name) > 1:
            raise BatchmixError(f"{file.name}: column {name!r} stands twice in the header")
    return header


def _csv_rows(reader: Any) -> list[list[str] | BadRecord]:
    """The next thousand rows or million characters; empty at the end."""
    rows: list[list[str] | BadRecord] = []
    size = 0
    while len(rows) < _CSV_ROWS and size < _CSV_CHARS:
        try:
            row = next(reader, None)
        except csv.Error as error:
            rows.append(BadRecord(f"the row is no CSV: {error}"))
            continue
        if row is None:
            break
        if row:
            rows.append(row)
            size += sum(map(len, row))
    return rows


def _csv_record(header: list[str], row: list[str] | BadRecord) -> Record:
    if isinstance(row, BadRecord):
        return row
    if len(row) != len(header):
        return BadRecord(f"the row has {len(row)} fields, the header {len(header)}")
    if not is_unicode("".join(row)):
        return BadRecord("the row is no UTF-8")
    return {name: value or None for name, value in zip(header, row, strict=True)}
