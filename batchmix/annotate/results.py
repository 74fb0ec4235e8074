"""A run's records, read back from its parts in whatever format they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchmix.annotate.answer import Answer
from batchmix.annotate.columns import MAJORITY, annotation_columns
from batchmix.annotate.task import answer_of
from batchmix.config import AnnotateConfig
from batchmix.data.columns import FIRST, LAST
from batchmix.data.schema import LOOSE, as_json_text, infer_schema, settle
from batchmix.data.storage import LocalFolder
from batchmix.errors import BatchmixError
from batchmix.run_info import read_run

_BATCH_ROWS = 1024
_SAMPLE_ROWS = 10_000  # lines of JSON whose values say what types the columns have


class Results:
    """The records of the run in `folder`. BatchmixError where there is none.

    `task` and `answer` are those of `batchmix annotate`; `answer` is None where the run had no task.
    """

    def __init__(self, folder: Path) -> None:
        if not str(folder) or not folder.is_dir():
            raise BatchmixError(f"output.dir={folder}: no such folder on this machine")
        self.folder = folder
        self.run = read_run(LocalFolder(folder))
        config = self.run["config"]
        self.format: str = config["output"]["format"]
        self.task = AnnotateConfig(**config.get("annotate", {}))
        self.answer: Answer | None = answer_of(self.task)
        self.paths = sorted(folder.glob(f"part-*.{self.format}"))

    @property
    def complete(self) -> bool:
        return (self.folder / "_SUCCESS").is_file()

    @cached_property
    def schema(self) -> pa.Schema:
        """Of the records; of JSON lines, as a sample and the task say."""
        if not self.paths:
            raise BatchmixError(f"output.dir={self.folder}: holds no rows yet")
        if self.format == "arrow":
            with pa.memory_map(str(self.paths[0])) as source:
                return pa.ipc.open_file(source).schema
        if self.format == "parquet":
            return pq.read_schema(self.paths[0])
        columns = annotation_columns(self.task)
        known = {field.name: field for field in [*FIRST, *LAST, *(columns.schema if columns else [])]}
        sample = list(islice((row for rows in self._lines() for row in rows), _SAMPLE_ROWS))
        return pa.schema([known.get(field.name, field) for field in settle(infer_schema(sample))])

    def column_of(self, name: str) -> str | None:
        """What the input's column `name` is called in the records: `input_<name>` where the name is one of ours."""
        columns = annotation_columns(self.task)
        ours = {*FIRST.names, *LAST.names, *(columns.schema.names if columns else ())}
        while name in ours:
            name = f"input_{name}"
        return name if name in self.schema.names else None

    def batches(self, columns: Sequence[str] | None = None, samples: bool = False) -> Iterator[pa.Table]:
        """All records in the order of the parts, of each row the majority's sample alone unless `samples`."""
        schema = self.schema
        chosen = MAJORITY.name if self.answer is not None else "sample_index"
        wanted = schema.names if columns is None else [name for name in schema.names if name in {*columns, chosen}]
        for table in self._tables(wanted):
            if not samples:
                table = table.filter(table[chosen] if self.answer is not None else pc.equal(table[chosen], 0))
            if columns is not None and chosen not in columns:
                table = table.drop_columns([chosen])
            yield table

    def rows(self, columns: Sequence[str] | None = None, samples: bool = False) -> Iterator[dict[str, Any]]:
        """The same as Python objects."""
        for table in self.batches(columns, samples):
            yield from table.to_pylist()

    def _tables(self, columns: list[str]) -> Iterator[pa.Table]:
        if self.format == "jsonl":
            schema = pa.schema([self.schema.field(name) for name in columns])
            for rows in self._lines():
                yield _table(rows, schema, self.folder)
            return
        for path in self.paths:
            if self.format == "parquet":
                yield from (
                    pa.Table.from_batches([b]) for b in pq.ParquetFile(path).iter_batches(_BATCH_ROWS, columns=columns)
                )
                continue
            with pa.memory_map(str(path)) as source:
                names = pa.ipc.open_file(source).schema.names
                options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns])
                reader = pa.ipc.open_file(source, options=options)
                for index in range(reader.num_record_batches):
                    yield pa.Table.from_batches([reader.get_batch(index)])

    def _lines(self) -> Iterator[list[dict[str, Any]]]:
        for path in self.paths:
            with path.open("rb") as file:
                while lines := file.readlines(1 << 20):
                    yield [_flat(json.loads(line)) for line in lines]


def _table(rows: list[dict[str, Any]], schema: pa.Schema, folder: Path) -> pa.Table:
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if field.metadata == LOOSE:
            values = [as_json_text(value) for value in values]
        try:
            columns.append(pa.array(values, field.type))
        except pa.ArrowException as error:
            raise BatchmixError(f"output.dir={folder}: column {field.name!r} holds values of several types ({error});"
                                " run with output.format=arrow, whose parts state them") from None  # fmt: skip
    return pa.Table.from_arrays(columns, schema=schema)


def _flat(line: dict[str, Any]) -> dict[str, Any]:
    """A line as the columns that other runs have; those of OpenAI batch files are responses."""
    if "custom_id" not in line or "response" not in line:
        return line
    body = (line["response"] or {}).get("body") or {}
    choice = (body.get("choices") or [{}])[0]
    usage = body.get("usage") or {}
    return {
        "row": int(str(line["id"]).rpartition("_")[2]),
        "id": line["custom_id"],
        "sample_index": 0,
        "generated_text": (choice.get("message") or {}).get("content"),
        "finish_reason": choice.get("finish_reason") or "error",
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "error": (line["error"] or {}).get("message"),
    }
