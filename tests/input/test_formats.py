from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import struct
import tracemalloc
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from slow_cases import slow_after

from batchmix.errors import BatchmixError
from batchmix.input import text_readers
from batchmix.input.arrow_readers import can_be_kept, plain
from batchmix.input.chunk import BadRecord, everything
from batchmix.input.config import DataFormat
from batchmix.input.data_file import DataFile
from batchmix.input.decompress import compression_of
from batchmix.input.formats import count_rows, guess_format, identify, read_chunks, stated_schema
from batchmix.output.columns import OutputColumns
from batchmix.output.config import OutputFormat
from batchmix.output.part_formats import part_format

JSONL, PARQUET, ARROW, CSV = DataFormat.jsonl, DataFormat.parquet, DataFormat.arrow, DataFormat.csv


def data_file(path: Path, form: DataFormat | None = None) -> DataFile:
    form = form or guess_format(str(path))
    assert form is not None
    file = DataFile(fsspec.filesystem("file"), str(path), str(path), form)
    return replace(file, compression=compression_of(path.read_bytes()[:8]))


def read(file: DataFile, wanted: Any = everything, columns: list[str] | None = None, **options: int) -> list[Any]:
    """(number, record or the reason why there is none) of each row."""
    return [
        (number, record.reason if isinstance(record, BadRecord) else record)
        for chunk in read_chunks(file, wanted, columns, **options)
        for number, record in zip(chunk.numbers, chunk.records, strict=True)
    ]


def records(path: Path, content: bytes, form: DataFormat | None = None) -> list[Any]:
    path.write_bytes(content)
    return [record for _, record in read(data_file(path, form))]


def test_guess_format() -> None:
    assert guess_format("/d/A.JSONL.GZ") is JSONL
    assert guess_format("s3://b/x.parquet") is PARQUET
    assert guess_format("https://host/x.csv.zst?sig=a.arrow") is CSV
    assert guess_format("/d/README.md") is None
    assert guess_format("/d/x.parquet.gzip") is PARQUET
    assert guess_format("/d/x.TSV.bz2") is CSV


# JSON lines


def test_json_lines_with_blank_lines_bom_and_crlf(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n\t{"a": 2} \r\n\n{"a": "\xc3\xa9"}'
    assert records(tmp_path / "a.jsonl", content) == [{"a": 1}, {"a": 2}, {"a": "é"}]
    assert records(tmp_path / "b.jsonl", b"\n\n") == []
    assert records(tmp_path / "b.jsonl", b"") == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "the line is no JSON: Expecting ',' delimiter at character 8"),
        (b'{"a": 1} {"a": 2}', "the line is no JSON: Extra data at character 10"),
        (b"{'a': 1}", "the line is no JSON"),
        (b'{"a": "\xff"}', "the line is no UTF-8: invalid start byte at byte 8"),
        (b'{"a": "\xed\xa0\x80"}', "the line is no UTF-8"),
        (b"[1, 2]", "the line holds a JSON array, not an object"),
        (b'"text"', "the line holds a JSON string, not an object"),
        (b"null", "the line holds a JSON null, not an object"),
        (b"12", "the line holds a JSON number, not an object"),
        (b"true", "the line holds a JSON boolean, not an object"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b"  " + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "the line cannot be read: Exceeds the limit"),
        (b'\xef\xbb\xbf{"a": 1}', "the line is no JSON"),
        (b'{"a": 1}\x00', "the line is no JSON"),
    ],
)
def test_a_bad_line_is_one_bad_record(tmp_path: Path, line: bytes, reason: str) -> None:
    first, bad, last = records(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert (first, last) == ({"a": 1}, {"a": 3})
    assert reason in bad
    assert "\n" not in bad


@pytest.mark.parametrize("block", [1, 7, 16, 20])
def test_lines_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(text_readers, "_BLOCK_BYTES", block)
    monkeypatch.setattr(text_readers, "MAX_LINE_BYTES", 20)
    long = json.dumps({"a": "x" * 100}).encode()
    just = b'{"a": "' + b"x" * 11 + b'"}'
    assert len(just) == 20
    content = b"\n".join([b'{"a": 1}', long, b"", just, long, long, b'{"a": 2}', just[:-2] + b'x"}', long])
    found = records(tmp_path / "a.jsonl", content)
    bad = "the line is longer than 0 MiB"
    assert found == [{"a": 1}, bad, {"a": "x" * 11}, bad, bad, {"a": 2}, bad, bad]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8, 64, 1 << 20])
def test_blocks_of_any_size_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(text_readers, "_BLOCK_BYTES", block)
    rows = [{"a": "é" * (number % 7), "b": number} for number in range(40)]
    bom = b"\xef\xbb\xbf" if block >= 3 else b""
    content = bom + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    assert records(tmp_path / "a.jsonl", content) == rows


# Compression


PACKS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress
}  # fmt: skip


@pytest.mark.parametrize("suffix", PACKS)
def test_compressed_files_of_several_members(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"a": "x" * 50 + str(number)}).encode() + b"\n" for number in range(3000)]
    pack = PACKS[suffix]
    halves = pack(b"".join(lines[:1500])) + pack(b"") + pack(b"".join(lines[1500:]))
    path = tmp_path / f"a.jsonl{suffix}"
    assert records(path, halves) == [json.loads(line) for line in lines]
    assert identify(data_file(path), JSONL) == data_file(path)


@pytest.mark.parametrize(
    "name", slow_after(2, ["a.jsonl.zst", "a.csv.gz", "a.jsonl.gz", "a.jsonl.bz2", "a.csv.zst", "a.csv.xz"])
)
def test_a_file_cut_off_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    text = b"".join(b'{"a":"%d"}\n' % value for value in rng.integers(0, 10**9, 100_000))
    packed = PACKS[name[name.rindex(".") :]](text)
    for size in (len(packed) - 1, len(packed) // 2, 12):
        with pytest.raises(BatchmixError, match=rf"{name}: cannot be read") as caught:
            records(tmp_path / name, packed[:size])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", PACKS)
def test_bytes_after_a_compressed_file_are_an_error(tmp_path: Path, suffix: str) -> None:
    """Python's own readers of bz2 and xz ignore them, and whatever else was to come."""
    packed = PACKS[suffix](b'{"a": 1}\n')
    with pytest.raises(BatchmixError, match=r"cannot be read"):
        records(tmp_path / f"a.jsonl{suffix}", packed + b"more" + packed)


@pytest.mark.parametrize("suffix", PACKS)
def test_decompression_is_incremental(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """32 MB of one line packed into a few KB are never held: not by the decompressor, and not as a line."""
    monkeypatch.setattr(text_readers, "MAX_LINE_BYTES", 1 << 20)
    bomb = b"a" * (32 << 20)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKS[suffix](b'{"a": "' + bomb + b'"}\n{"a": 2}\n'))
    del bomb
    found: list[Any] = []
    assert _peak_of(lambda: found.extend(read(data_file(path)))) < 24 << 20
    assert found == [(0, "the line is longer than 1 MiB"), (1, {"a": 2})]


@pytest.mark.parametrize("row", [b"x" * (8 << 20), b"x," * (2 << 20), b'"' + (b"x" * 9999 + b"\n") * 800 + b'"'])
def test_a_csv_row_of_any_size_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: bytes) -> None:
    """Of one line, of many fields on a line, and of many lines in one quoted field."""
    monkeypatch.setattr(text_readers, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"a\n1\n" + row + b"\n2\n", 1))
    del row
    assert _peak_of(lambda: deque(read_chunks(data_file(path), everything), 0)) < 7 << 20
    found = [record for _, record in read(data_file(path))]
    assert found[:2] == [{"a": "1"}, "the row is no CSV: it is longer than 1 Mi characters"]
    assert found[-1] == {"a": "2"} or isinstance(found[-1], str)


def _peak_of(work: Callable[[], object]) -> int:
    """Bytes of Python's memory that it takes at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_damaged_zstandard_file_and_a_long_window(tmp_path: Path) -> None:
    packed = bytearray(zstandard.ZstdCompressor().compress(b'{"a": 1}\n' * 1000))
    packed[10:14] = b"\xff\xff\xff\xff"
    with pytest.raises(BatchmixError, match=r"a.jsonl.zst: cannot be read"):
        records(tmp_path / "a.jsonl.zst", bytes(packed))
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    long = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    assert records(tmp_path / "a.jsonl.zst", long.compress(b'{"a": 1}\n') + long.flush()) == [{"a": 1}]


def test_a_zstandard_file_that_begins_with_a_frame_to_skip(tmp_path: Path) -> None:
    skipped = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"abcd"
    path = tmp_path / "a.jsonl.zst"
    assert records(path, skipped + zstandard.ZstdCompressor().compress(b'{"a": 1}\n')) == [{"a": 1}]
    assert identify(data_file(path), JSONL) == data_file(path)


# CSV


def test_csv_fields_are_text_and_empty_ones_null(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfa,b\r\n\r\n1,"x, ""y""\r\nz"\r\n,\xc3\xa9\r\n'
    assert records(tmp_path / "a.csv", content) == [{"a": "1", "b": 'x, "y"\r\nz'}, {"a": None, "b": "é"}]
    assert records(tmp_path / "b.csv", b"a,b\n") == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1", "the row has 1 fields, the header 2"),
        (b"1,2,3", "the row has 3 fields, the header 2"),
        (b"1,\xff", "the row is no UTF-8"),
        (b'1,"a"b', "the row is no CSV: ',' expected after '\"'"),
    ],
)
def test_a_bad_csv_row_is_one_bad_record(tmp_path: Path, line: bytes, reason: str) -> None:
    assert records(tmp_path / "a.csv", b"a,b\n1,x\n" + line + b"\n3,y\n") == [
        {"a": "1", "b": "x"},
        reason,
        {"a": "3", "b": "y"},
    ]


def test_a_quote_that_never_ends_and_a_field_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert records(tmp_path / "a.csv", b'a\n1\n"2\n3\n') == [{"a": "1"}, "the row is no CSV: unexpected end of data"]
    monkeypatch.setattr(text_readers, "MAX_LINE_BYTES", 10)
    found = records(tmp_path / "b.csv", b"a\n" + b"x" * 11 + b"\n2\n")
    assert found == ["the row is no CSV: it is longer than 0 Mi characters", {"a": "2"}]
    csv.field_size_limit(1 << 17)


@pytest.mark.parametrize(
    ("header", "reason"),
    [(b"a,b,a", "column 'a' stands twice"), (b"a,\xff", "name of column 2 is no UTF-8"), (b'a,"b', "cannot be read")],
)
def test_a_bad_csv_header_is_an_error(tmp_path: Path, header: bytes, reason: str) -> None:
    with pytest.raises(BatchmixError, match=f"a.csv: .*{reason}"):
        records(tmp_path / "a.csv", header + b"\n1,2,3\n")


def test_long_csv_rows_come_in_small_chunks(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"a\n" + (b"x" * 500_000 + b"\n") * 10)
    sizes = [len(chunk.numbers) for chunk in read_chunks(data_file(path), everything)]
    assert max(sizes) <= 3
    assert sum(sizes) == 10


# Parquet and Arrow


def write(path: Path, table: pa.Table, **options: Any) -> DataFile:
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
    else:
        new = pa.ipc.new_stream if path.name == "stream.arrow" else pa.ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=options.get("row_group_size"))
    return data_file(path)


FILES = ["a.parquet", "a.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", FILES)
def test_column_wise_files(tmp_path: Path, name: str) -> None:
    table = pa.table(
        {"a": list(range(5000)), "b": [[{"c": str(number)}] for number in range(5000)], "d.e": ["x"] * 5000}
    )
    file = write(tmp_path / name, table, row_group_size=1500)
    assert read(file) == list(enumerate(table.to_pylist()))
    assert read(file, lambda start, stop: np.arange(start, stop) % 700 == 3, ["d.e", "a", "none"]) == [
        (number, {"a": number, "d.e": "x"}) for number in range(3, 5000, 700)
    ]
    assert [number for number, _ in read(file, limit=1)] == list(range(1024))
    assert stated_schema(file).equals(table.schema)
    assert count_rows(file) == (5000 if name == "a.parquet" else None)


def test_parquet_row_groups_without_a_wanted_row_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    write(path, pa.table({"a": rng.integers(0, 2**60, 3000)}), row_group_size=1000)
    middle = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = middle.dictionary_page_offset or middle.data_page_offset
    content[start : start + middle.total_compressed_size] = b"\xff" * middle.total_compressed_size
    path.write_bytes(content)
    rows = read(data_file(path), lambda start, stop: np.arange(start, stop) // 1000 != 1)
    assert [number for number, _ in rows] == [*range(1000), *range(2000, 3000)]
    assert len(read(data_file(path), limit=1000)) == 1000
    with pytest.raises(BatchmixError, match=r"a.parquet: cannot be read past row 1000 \("):
        read(data_file(path))


@pytest.mark.parametrize("name", FILES)
def test_column_wise_files_cut_off(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / name
    write(path, pa.table({"a": rng.integers(0, 2**60, 9000)}), row_group_size=1000)
    content = path.read_bytes()
    for size in (len(content) // 2, 40):
        path.write_bytes(content[:size])
        with pytest.raises(BatchmixError, match=rf"{name}: cannot be read") as caught:
            read(data_file(path))
        assert "\n" not in str(caught.value)


def test_a_value_that_python_cannot_hold_is_one_bad_record(tmp_path: Path) -> None:
    text = pa.StringArray.from_buffers(3, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffc"))
    file = write(tmp_path / "a.arrow", pa.table({"x": text}))
    assert read(file) == [(0, {"x": "a"}), (1, "column 'x' is no UTF-8: invalid start byte at byte 1"), (2, {"x": "c"})]
    dates = pa.array([0, 10**8, 1], pa.int32()).cast(pa.date32())
    found = read(write(tmp_path / "b.arrow", pa.table({"x": dates})))
    assert found[1][1].startswith("column 'x' cannot be read: ")
    assert [number for number, _ in found] == [0, 1, 2]


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["a", "b", None]).dictionary_encode(),
        pa.array(["a", "b", None], pa.string_view()),
        pa.array([b"a", b"b", None], pa.binary_view()),
        pa.array([["a"], [], None], pa.list_(pa.string_view())),
        pa.array([["a"], [], None], pa.large_list(pa.string_view())),
        pa.array([{"a": "x"}, {}, None], pa.struct([("a", pa.string_view())])),
        pa.array([["a"], ["b"], None], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    ],
    ids=lambda array: str(array.type)[:30],
)
def test_encoded_columns_are_read_as_their_values(tmp_path: Path, array: Any) -> None:
    file = write(tmp_path / "stream.arrow", pa.table({"x": array}))
    values = array.to_pylist()
    assert read(file) == [(number, {"x": value}) for number, value in enumerate(values)]
    assert read(file, lambda start, stop: np.arange(start, stop) == 1) == [(1, {"x": values[1]})]
    kind = plain(array.type)
    assert can_be_kept(kind)
    assert pa.array(values, kind).to_pylist() == values


def test_types_that_the_output_cannot_hold() -> None:
    union = pa.dense_union([pa.field("a", pa.int64())])
    assert not can_be_kept(union)
    assert not can_be_kept(pa.list_(pa.struct([("a", union)])))
    assert not can_be_kept(pa.bool8())
    assert not can_be_kept(pa.run_end_encoded(pa.int32(), pa.string()))
    assert not can_be_kept(pa.fixed_shape_tensor(pa.int64(), [2]))
    assert can_be_kept(pa.uuid())
    for kind in (pa.month_day_nano_interval(), pa.struct([])):
        columns = OutputColumns(pa.schema([("x", kind)]), token_ids=False, logprobs=False)
        with pytest.raises(BatchmixError, match=r"output\.format=parquet: .*data\.columns"):
            part_format(OutputFormat.parquet, columns, None, None)


# What a file is


def bytes_of(kind: str) -> bytes:
    table = pa.table({"a": [1]})
    sink = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink)
    elif kind in ("file", "stream"):
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue() or {"json": b'{"a": 1}\n', "gzip": gzip.compress(b'{"a": 1}\n', mtime=0)}[kind]


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jsonl", "json"), ("a.parquet", "parquet"), ("a.arrow", "file"), ("a.arrow", "stream")]
)
def test_files_that_are_what_they_are_called(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(bytes_of(kind))
    file = data_file(tmp_path / name)
    assert identify(file, file.format) == file


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", bytes_of("parquet"), "is not jsonl but parquet; rename it or set data.format"),
        ("a.jsonl", bytes_of("stream"), "is not jsonl but arrow"),
        ("a.csv", bytes_of("file"), "is not csv but arrow"),
        ("a.parquet", bytes_of("json"), "is not parquet but text"),
        ("a.arrow", bytes_of("parquet"), "is not arrow but parquet"),
        ("a.jsonl", b"PK\x03\x04rest", "is not jsonl but a zip archive"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "is UTF-16 text; write it as UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16-le"), "is not jsonl but binary data"),
        ("a.jsonl.gz", gzip.compress(bytes_of("parquet"), mtime=0), "is not jsonl but parquet"),
        (
            "a.jsonl",
            b' \n[{"a": 1}]',
            "is one JSON array, not JSON lines; convert it: cat .* | jq -c '.\\[\\]' > data.jsonl",
        ),
        ("a.jsonl.bz2", bz2.compress(b"[]"), "is one JSON array, not JSON lines; convert it: bunzip2 -c "),
        ("a.csv", "a,b".encode("utf-16"), "is UTF-16 text; set data.csv_encoding=utf-16"),
        ("a.parquet.gz", gzip.compress(bytes_of("parquet"), mtime=0), "is parquet packed as gzip, .* unpack it"),
        ("a.arrow.zst", zstandard.compress(bytes_of("file")), "is arrow packed as zstd, .* unpack it"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "cannot be read"),
    ],
)
def test_files_that_are_not_what_they_are_called(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    file = data_file(tmp_path / name)
    with pytest.raises(BatchmixError, match=f"{name}: {reason}") as caught:
        identify(file, file.format, certain=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "form", "compression"),
    [
        ("a.jsonl", bytes_of("parquet"), PARQUET, None),
        ("a.parquet.gz", bytes_of("parquet"), PARQUET, None),
        ("a.parquet.gzip", bytes_of("parquet"), PARQUET, None),
        ("a.csv", bytes_of("file"), ARROW, None),
        ("a.jsonl", bytes_of("gzip"), JSONL, "gzip"),
        ("a.jsonl.gz", bytes_of("json"), JSONL, None),
        ("a.jsonl.gz", zstandard.compress(bytes_of("json")), JSONL, "zstd"),
        ("part-00000", bytes_of("parquet"), PARQUET, None),
        ("part-00000", bytes_of("stream"), ARROW, None),
        ("part-00000", bz2.compress(bytes_of("json")), JSONL, "bzip2"),
        ("part-00000", lzma.compress(bytes_of("json")), JSONL, "xz"),
    ],
)
def test_bytes_say_what_names_do_not(
    tmp_path: Path, name: str, content: bytes, form: DataFormat, compression: str | None
) -> None:
    (tmp_path / name).write_bytes(content)
    named = guess_format(name)
    found = identify(DataFile(fsspec.filesystem("file"), str(tmp_path / name), name, named or DataFormat.auto), named)
    assert found is not None
    assert (found.format, found.compression) == (form, compression)
    assert len(read(found)) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\xef\xbb\xbf\r\n \n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.jsonl.zst", zstandard.compress(b"\n")),
        ("a.jsonl.bz2", bz2.compress(b"")),
        ("a.jsonl.xz", lzma.compress(b" ")),
        ("a.parquet", b""),
        ("a.csv", b"\n\n"),
    ],
)
def test_empty_files_are_none(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert identify(data_file(tmp_path / name), guess_format(name), certain=True) is None
