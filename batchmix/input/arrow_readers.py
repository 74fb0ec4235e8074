"""Readers of Parquet and Arrow IPC. Only what is wanted is made into Python objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchmix.input.chunk import BadRecord, Chunk, Record, Wanted, wanted_places
from batchmix.input.data_file import DataFile, reading

_BATCH_ROWS = 1024
_BATCH_BYTES = 4 << 20  # of rows as the file's metadata or Arrow's buffers count them, made into objects at once


def parquet_schema(file: DataFile) -> pa.Schema:
    with file.open() as opened, file.reading():
        return pq.read_schema(opened)


def parquet_rows(file: DataFile) -> int:
    with file.open() as opened, file.reading():
        return int(pq.read_metadata(opened).num_rows)


def arrow_schema(file: DataFile) -> pa.Schema:
    with file.open() as opened, file.reading():
        return _open_arrow(opened).schema


def read_parquet(file: DataFile, wanted: Wanted, columns: Sequence[str] | None, limit: int) -> Iterator[Chunk]:
    """The wanted ones of the first `limit` rows; row groups without one are not read."""
    start = 0
    with file.open() as opened:
        with file.reading():
            parquet = pq.ParquetFile(opened)
        present = None if columns is None else [name for name in columns if name in parquet.schema_arrow.names]
        for group in range(parquet.num_row_groups):
            if start >= limit:
                return
            metadata = parquet.metadata.row_group(group)
            rows = metadata.num_rows
            if wanted(start, start + rows).any():
                at_once = _rows_at_once(metadata.total_byte_size, rows)
                batches = parquet.iter_batches(at_once, row_groups=[group], columns=present)
                yield from read_batches(file.name, batches, wanted, start=start, limit=limit)
            start += rows


def _open_arrow(file: IO[bytes], columns: Sequence[str] | None = None) -> Any:
    """A reader of Arrow's file format, or of its stream format, whichever the bytes are; only of `columns`."""
    magic = file.read(6)
    file.seek(0)
    open_reader = pa.ipc.open_file if magic == b"ARROW1" else pa.ipc.open_stream
    reader = open_reader(file)
    if columns is None:
        return reader
    file.seek(0)
    included = [index for index, name in enumerate(reader.schema.names) if name in columns]
    return open_reader(file, options=pa.ipc.IpcReadOptions(included_fields=included))


def read_arrow(file: DataFile, wanted: Wanted, columns: Sequence[str] | None, limit: int) -> Iterator[Chunk]:
    """The wanted ones of the first `limit` rows."""
    with file.open() as opened:
        with file.reading():
            reader = _open_arrow(opened, columns)
        if isinstance(reader, pa.RecordBatchFileReader):
            batches: Iterable[Any] = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = reader
        yield from read_batches(file.name, batches, wanted, limit=limit)


def read_batches(name: str, batches: Iterable[Any], wanted: Wanted, *, start: int = 0, limit: int) -> Iterator[Chunk]:
    """The wanted rows of Arrow batches whose first row is `start`, made into Python objects a thousand at a time.

    `name` is what an error calls the file.
    """
    remaining = iter(batches)
    while start < limit:
        with reading(name, start):
            batch = next(remaining, None)
        if batch is None:
            return
        at_once = _rows_at_once(batch.nbytes, batch.num_rows)
        for low in range(0, min(batch.num_rows, limit - start), at_once):
            part = _decoded(batch.slice(low, at_once))
            if places := wanted_places(wanted, start + low, part.num_rows):
                if len(places) < part.num_rows:
                    part = part.take(pa.array(places))
                yield Chunk([start + low + place for place in places], _to_records(part))
        start += batch.num_rows


def _rows_at_once(num_bytes: int, rows: int) -> int:
    """Rows of which so many, of `rows` in `num_bytes`, have _BATCH_BYTES."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, num_bytes)))


def _to_records(batch: Any) -> list[Record]:
    if not batch.num_columns:
        return [{} for _ in range(batch.num_rows)]
    try:
        records: list[Record] = batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date after the year 9999
        return [_to_record(batch.slice(row, 1)) for row in range(batch.num_rows)]
    return records


def _to_record(row: Any) -> Record:
    values = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            values[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            return BadRecord(f"column {name!r} is no UTF-8: {error.reason} at byte {error.start + 1}")
        except (ValueError, OverflowError) as error:
            return BadRecord(f"column {name!r} cannot be read: {error}")
    return values


def _decoded(batch: Any) -> Any:
    """The batch in types that the output has too, see `plain`."""
    schema = pa.schema([field.with_type(plain(field.type)) for field in batch.schema])
    return batch if schema.equals(batch.schema) else batch.cast(schema)


def plain(kind: pa.DataType) -> pa.DataType:
    """The type without encodings: dictionary columns as their values, string views as strings.

    An Arrow file holds one dictionary for a column, but output is written as it comes; and view types cannot be
    sliced by every release of Arrow nor read by every reader.
    """
    if pa.types.is_dictionary(kind):
        return plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    return kind


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain(field.type))


def can_be_kept(kind: pa.DataType) -> bool:
    """Whether Python objects can be made into a column of this type again."""
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name) not in ("arrow.bool8", "arrow.fixed_shape_tensor")
    if pa.types.is_union(kind) or pa.types.is_run_end_encoded(kind):
        return False
    return all(can_be_kept(kind.field(index).type) for index in range(kind.num_fields))
