"""`batchmix export`: a finished run as a data set for others, with its card, in a folder or on the hub."""

from __future__ import annotations

import base64
import datetime
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from batchmix.annotate.card import MADE_BY, card
from batchmix.annotate.columns import INVALID, MAJORITY
from batchmix.annotate.config import ExportConfig, ExportFormat
from batchmix.annotate.corrections import REVIEWED, Corrections, corrected, of_run, read_corrections
from batchmix.annotate.results import Results
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.input import strict_json
from batchmix.storage import LocalFolder, Storage, open_storage, write_text, written

_LEFT_OUT = ("logprobs", "generated_token_ids")  # of use to the engine's users rather than the data's
_FORMULA = re.compile(r"^[=+\-@\t\r\n]")  # what a spreadsheet runs, or takes for the beginning of what it does
_CARD = "README.md"
_FILE = re.compile(rf"data/train-[0-9]+\.({'|'.join(form.value for form in ExportFormat)})")
_PER_SAMPLE = ("sample_index", MAJORITY.name)


def export(config: Config) -> None:
    """Write `export.dir/data/train-*` and `export.dir/README.md`, and push both where a repository is named."""
    settings = config.export
    if not settings.dir:
        raise BatchmixError("export.dir is not set: give a folder, for example export.dir=dataset")
    if settings.repo_id is not None and settings.format is not ExportFormat.parquet:
        raise BatchmixError(f"export.format={settings.format.value}: the hub takes parquet, which is the default")
    storage = open_storage(settings.dir, "export.dir")
    if settings.repo_id is not None and not isinstance(storage, LocalFolder):
        raise BatchmixError(f"export.dir={settings.dir}: export.repo_id uploads files of this machine; give a folder")
    if _place(settings.dir) == _place(config.output.dir):
        raise BatchmixError(
            f"export.dir={settings.dir}: is output.dir, whose parts could not be read as one data set then; give another"
        )
    results = Results(config.output.dir)
    if not results.complete:
        raise BatchmixError(f"output.dir={results.url}: the run is not finished; run its command again for the rest")
    corrections = _corrections(settings, results)
    _refuse_others(storage, settings.dir)
    names, counts, schema = write_files(results, settings, storage, corrections)
    text = card(results, settings, counts, schema)
    with written(settings.dir, "export.dir"):
        write_text(storage, _CARD, text)
    print(f"{counts['rows']:,} records in {len(names)} files: {storage.url}")
    if counts["guarded"]:
        print(f"{counts['guarded']:,} cells that spreadsheets would run as formulas begin with ' now;"
              " export.guard_formulas=false leaves them as they are")  # fmt: skip
    if corrections is not None and (lost := len(corrections) - counts["reviewed"]):
        print(
            f"{lost:,} of the corrections are of rows that this run does not have: is export.corrections of another run?"
        )
    if settings.repo_id is not None:
        assert isinstance(storage, LocalFolder)
        print(f"pushed: {push([str(storage.path(name)) for name in names], settings, text)}")


def write_files(
    results: Results, settings: ExportConfig, storage: Storage, corrections: Corrections | None
) -> tuple[list[str], Counter[str], pa.Schema]:
    """The files' names, how many records of which kind they hold, and their columns. Each file appears whole or not at all."""
    with written(settings.dir, "export.dir"):
        storage.make_folder("data")
        write_text(storage, _CARD, f"{MADE_BY} the export is not finished.\n")  # an export that was killed is ours too
        for form in ExportFormat:  # an earlier export's
            for name in storage.names(f"data/train-*.{form.value}"):
                storage.delete(name)
    counts: Counter[str] = Counter()
    names: list[str] = []
    schema = pa.schema([])
    for table in _files(_tables(results, settings, corrections), settings.rows_per_file):
        counts.update(_count(table))
        names.append(f"data/train-{len(names):05}.{settings.format.value}")
        schema = table.schema
        if settings.format is ExportFormat.csv:
            table, guarded = _as_texts(table, settings.guard_formulas)
            counts["guarded"] += guarded
        with written(settings.dir, "export.dir"):
            storage.replace(names[-1], partial(_WRITERS[settings.format], table))
    return names, counts, schema


def _refuse_others(storage: Storage, place: str) -> None:
    """BatchmixError where the folder holds what no export wrote, which would be replaced or be part of the data set."""
    with written(place, "export.dir"):
        files = storage.names("data/*")
        found = [name for name in storage.names("*") if name not in (_CARD, "data")]
        found += [name for name in files if not _FILE.fullmatch(name)]
        if not storage.exists(_CARD):
            found += [name for name in files if _FILE.fullmatch(name)]
        elif MADE_BY.encode() not in storage.read(_CARD):
            found.append(_CARD)
    if found:
        more = f" and {len(found) - 1:,} more files" if len(found) > 1 else ""
        raise BatchmixError(
            f"export.dir={place}: holds {found[0]}{more}, which batchmix export did not write; give a folder of its own"
        )


def push(files: list[str], settings: ExportConfig, text: str) -> str:
    """Upload through `datasets`, then the card; the token is huggingface_hub's own. Returns the address."""
    import datasets
    import huggingface_hub

    assert settings.repo_id is not None
    dataset = datasets.load_dataset("parquet", data_files=files, split="train")
    dataset.push_to_hub(settings.repo_id, private=settings.private)
    huggingface_hub.HfApi().upload_file(
        path_or_fileobj=text.encode(), path_in_repo=_CARD, repo_id=settings.repo_id, repo_type="dataset"
    )
    return f"{huggingface_hub.constants.ENDPOINT}/datasets/{settings.repo_id}"


def _place(url: str) -> str:
    return url.rstrip("/") if "://" in url else os.path.realpath(os.path.expanduser(url))


def _corrections(settings: ExportConfig, results: Results) -> Corrections | None:
    if settings.corrections is None:
        return None
    if results.answer is None:
        raise BatchmixError(f"output.dir={results.url}: was not made by batchmix annotate, so nothing can be corrected")
    if settings.samples:
        raise BatchmixError("export.samples=true: corrections are of rows, not of samples; leave one of the two out")
    corrections = read_corrections(settings.corrections, results.answer.fields)
    of_run(corrections, results, f"export.corrections={settings.corrections}")
    return corrections


def _tables(results: Results, settings: ExportConfig, corrections: Corrections | None) -> Iterator[pa.Table]:
    left_out = {*_LEFT_OUT, *(() if settings.samples else _PER_SAMPLE)}
    names = [name for name in results.schema.names if name not in left_out]
    for table in results.batches(names, settings.samples):
        if corrections is not None:
            assert results.answer is not None
            table = corrected(table, corrections, results.answer.fields)
        yield table


def _files(tables: Iterator[pa.Table], rows_per_file: int) -> Iterator[pa.Table]:
    """The records in tables of `rows_per_file`, the last one smaller."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += len(table)
        while rows >= rows_per_file:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, rows_per_file)
            waiting = [whole.slice(rows_per_file)]
            rows -= rows_per_file
    if rows or waiting:
        last = pa.concat_tables(waiting)
        if len(last):
            yield last


def _count(table: pa.Table) -> Counter[str]:
    found = Counter(rows=len(table), errors=len(table) - table["error"].null_count)
    if INVALID.name in table.schema.names:
        found["invalid"] = len(table) - table[INVALID.name].null_count
    if REVIEWED in table.schema.names:
        found["reviewed"] = pc.sum(table[REVIEWED]).as_py() or 0
    return found


def _write_parquet(table: pa.Table, file: IO[bytes]) -> None:
    pq.write_table(table, file, compression="zstd")


def _write_jsonl(table: pa.Table, file: IO[bytes]) -> None:
    for batch in table.to_batches(1024):
        for row in batch.to_pylist():
            file.write(strict_json.dumps(row, default=_json_value).encode() + b"\n")


def _json_value(value: Any) -> Any:
    """What JSON has no type for: bytes in base64, times and all else as text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def _as_texts(table: pa.Table, guard: bool) -> tuple[pa.Table, int]:
    """The columns as CSV has them, lists and structs as JSON text, and how many cells were guarded, names of columns
    included. Numbers and dates stay what they are; a text that looks like a number is a text."""
    names: list[str] = []
    columns: list[Any] = []
    guarded = 0
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_nested(column.type):
            texts = [None if value is None else strict_json.dumps(value, default=_json_value)
                     for value in column.to_pylist()]  # fmt: skip
            column = pa.array(texts, pa.string())
        elif pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if guard and _FORMULA.match(name):
            name, guarded = f"'{name}", guarded + 1
        if guard and (
            pa.types.is_unicode(column.type) or pa.types.is_large_unicode(column.type) or _is_binary(column.type)
        ):
            begins = pc.match_substring_regex(column, _FORMULA.pattern)
            guarded += pc.sum(begins).as_py() or 0
            quote = pa.scalar("'", column.type)
            column = pc.if_else(begins, pc.binary_join_element_wise(quote, column, pa.scalar("", column.type)), column)
        names.append(name)
        columns.append(column)
    return pa.Table.from_arrays(columns, names=names), guarded


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


_WRITERS = {ExportFormat.parquet: _write_parquet, ExportFormat.jsonl: _write_jsonl, ExportFormat.csv: pa_csv.write_csv}
