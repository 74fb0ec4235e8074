"""The formats of input files: which a file is of, by its name and by its bytes, and the reader of each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import pyarrow as pa

from batchmix.config import DataFormat
from batchmix.data.arrow_readers import arrow_schema, parquet_rows, parquet_schema, read_arrow, read_parquet
from batchmix.data.chunk import Chunk, Wanted
from batchmix.data.data_file import COMPRESSION, DataFile
from batchmix.data.text_readers import read_csv, read_json_lines
from batchmix.errors import BatchmixError

_EXTENSIONS = {
    ".jsonl": DataFormat.jsonl,
    ".ndjson": DataFormat.jsonl,
    ".json": DataFormat.jsonl,
    ".parquet": DataFormat.parquet,
    ".arrow": DataFormat.arrow,
    ".feather": DataFormat.arrow,
    ".csv": DataFormat.csv,
}
JSON_LINES = (DataFormat.jsonl, DataFormat.openai_batch)
_HEAD_BYTES = 64 << 10
_BLANK = b"\xef\xbb\xbf \t\r\n"  # the byte order mark and white space


def read_chunks(
    file: DataFile, wanted: Wanted, columns: Sequence[str] | None = None, limit: int = sys.maxsize
) -> Iterator[Chunk]:
    """The wanted ones of the file's first `limit` rows, in order.

    `wanted` is asked about every row up to where the reading ends. `columns` limits what column-wise formats decode.
    What is not wanted is not decoded where the format allows, and no more is read once `limit` rows have passed.
    """
    if file.format is DataFormat.parquet:
        return read_parquet(file, wanted, columns, limit)
    if file.format is DataFormat.arrow:
        return read_arrow(file, wanted, columns, limit)
    if file.format is DataFormat.csv:
        return read_csv(file, wanted, limit)
    return read_json_lines(file, wanted, limit)


def stated_schema(file: DataFile) -> pa.Schema | None:
    """The schema that the file itself states; None for text formats."""
    if file.format is DataFormat.parquet:
        return parquet_schema(file)
    return arrow_schema(file) if file.format is DataFormat.arrow else None


def count_rows(file: DataFile) -> int | None:
    """Rows, where the file's metadata tells without reading it."""
    return parquet_rows(file) if file.format is DataFormat.parquet else None


def guess_format(path: str) -> DataFormat | None:
    """The format that a file's extension stands for, a compression suffix and a URL's query set aside."""
    name = path.lower().split("?")[0] if "://" in path else path.lower()
    for suffix in COMPRESSION:
        name = name.removesuffix(suffix)
    return next((form for extension, form in _EXTENSIONS.items() if name.endswith(extension)), None)


def check_magic(file: DataFile) -> None:
    """BatchmixError if the first bytes say that the file is not of its format, or if it is empty."""
    with file.open(raw=True) as raw, file.reading():
        stored = raw.read(8)
    if not stored:
        raise BatchmixError(f"{file.name}: is empty")
    found = "gzip" if stored.startswith(b"\x1f\x8b") else "zstd" if _is_zstd(stored) else None
    if found != file.compression:
        says = f"is {found}" if found else "is not compressed"
        raise BatchmixError(f"{file.name}: {says}, which its name does not say; rename it")
    with file.open() as opened, file.reading():
        head = opened.read(_HEAD_BYTES)
    start = head.lstrip(_BLANK)[:1]
    if not start and len(head) < _HEAD_BYTES:
        raise BatchmixError(f"{file.name}: is empty")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BatchmixError(f"{file.name}: is UTF-16 text; write it as UTF-8")
    kind = _sniff(head)
    if kind != (file.format.value if file.format in (DataFormat.parquet, DataFormat.arrow) else "text"):
        raise BatchmixError(f"{file.name}: is not {file.format.value} but {kind}; rename it or set data.format")
    if file.format in JSON_LINES and start == b"[":
        raise BatchmixError(f"{file.name}: is one JSON array, not JSON lines; write one object a line")


def _is_zstd(head: bytes) -> bool:
    """A frame, or one of those to be skipped with which parallel compressors begin."""
    return head.startswith(b"\x28\xb5\x2f\xfd") or (head[0] & 0xF0 == 0x50 and head[1:4] == b"\x2a\x4d\x18")


def _sniff(head: bytes) -> str:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive"
    # Zeros further on are a damaged line of a text, which is one bad row.
    return "binary data" if b"\x00" in head.partition(b"\n")[0] else "text"
