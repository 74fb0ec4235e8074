"""The formats of input files: which a file is of, by its name and by its bytes, and the reader of each."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from batchmix.errors import BatchmixError
from batchmix.input.arrow_readers import arrow_schema, parquet_rows, parquet_schema, read_arrow, read_parquet
from batchmix.input.chunk import Chunk, Wanted
from batchmix.input.config import DataFormat
from batchmix.input.data_file import DataFile
from batchmix.input.decompress import SUFFIXES, compression_of
from batchmix.input.text_readers import read_csv, read_json_lines, read_text_lines

_EXTENSIONS = {
    ".jsonl": DataFormat.jsonl,
    ".ndjson": DataFormat.jsonl,
    ".json": DataFormat.jsonl,
    ".parquet": DataFormat.parquet,
    ".arrow": DataFormat.arrow,
    ".feather": DataFormat.arrow,
    ".csv": DataFormat.csv,
    ".tsv": DataFormat.csv,
    ".txt": DataFormat.text,
}
JSON_LINES = (DataFormat.jsonl, DataFormat.openai_batch)
_HEAD_BYTES = 64 << 10
_BLANK = b"\xef\xbb\xbf \t\r\n"  # the byte order mark and white space
_BINARY = {"parquet": DataFormat.parquet, "arrow": DataFormat.arrow}
_UNPACK = {"gzip": "gunzip -c", "zstd": "zstd -dc", "bzip2": "bunzip2 -c", "xz": "xz -dc", None: "cat"}


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
    if file.format is DataFormat.text:
        return read_text_lines(file, wanted, limit)
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
    """The format that a file's extension stands for, compression suffixes and a URL's query set aside."""
    name = bare_name(path)
    return next((form for extension, form in _EXTENSIONS.items() if name.endswith(extension)), None)


def bare_name(path: str) -> str:
    """The path in lower case without compression suffixes and a URL's query."""
    name = path.lower().split("?")[0] if "://" in path else path.lower()
    while suffix := next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None):
        name = name.removesuffix(suffix)
    return name


def identify(file: DataFile, named: DataFormat | None, *, certain: bool = False) -> DataFile | None:
    """The file with the format and the compression that its bytes have; None for a file without contents.

    `named` is what data.format (then `certain`) or the file's name says, None where neither does: Parquet, Arrow and
    compression are told by the bytes, JSON lines without a name by the first of them. BatchmixError for a file that is
    no data, or not of the format that is certain.
    """
    with file.open(raw=True) as raw, file.reading():
        file = replace(file, compression=compression_of(raw.read(8)))
    with file.open() as opened, file.reading():
        head = opened.read(_HEAD_BYTES)
    start = head.lstrip(_BLANK)[:1]
    if not start and len(head) < _HEAD_BYTES:
        return None
    kind = _sniff(head)
    if named is DataFormat.csv and file.encoding is not None and kind not in _BINARY:
        return replace(file, format=named)  # text in any encoding, also one of two bytes a character
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        remedy = "set data.csv_encoding=utf-16" if named is DataFormat.csv else "write it as UTF-8"
        raise BatchmixError(f"{file.name}: is UTF-16 text; {remedy}")
    if kind in _BINARY and not (certain and named is not _BINARY[kind]):
        if file.compression is not None and not head.startswith(b"\xff\xff\xff\xff"):
            raise BatchmixError(f"{file.name}: is {kind} packed as {file.compression}, which cannot be read from its end;"
                                " unpack it")  # fmt: skip
        return replace(file, format=_BINARY[kind])
    if kind == "text" and start == b"{" and (named is None or (named is DataFormat.text and not certain)):
        named = DataFormat.jsonl
    if named is None:
        names = ", ".join(form.value for form in DataFormat if form is not DataFormat.auto)
        raise BatchmixError(f"{file.name}: its name does not say what it is; set data.format ({names})")
    if kind != (named.value if named in _BINARY.values() else "text"):
        raise BatchmixError(f"{file.name}: is not {named.value} but {kind}; rename it or set data.format")
    if named in JSON_LINES and start == b"[":
        unpack, name = _UNPACK[file.compression], shlex.quote(file.name)
        raise BatchmixError(f"{file.name}: is one JSON array, not JSON lines; convert it: "
                            f"{unpack} {name} | jq -c '.[]' > data.jsonl")  # fmt: skip
    return replace(file, format=named)


def _sniff(head: bytes) -> str:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive"
    # Zeros further on are a damaged line of a text, which is one bad row.
    return "binary data" if b"\x00" in head.partition(b"\n")[0] else "text"
