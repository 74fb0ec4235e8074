"""A run's records, read back from its parts in whatever format they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchmix.annotate.answer import Answer
from batchmix.annotate.columns import MAJORITY, annotation_columns
from batchmix.annotate.config import AnnotateConfig
from batchmix.annotate.task import answer_of
from batchmix.errors import BatchmixError
from batchmix.input.schema import LOOSE, as_json_text, infer_schema, settle
from batchmix.output.columns import FIRST, ID, LAST
from batchmix.output.finalize import is_finished
from batchmix.output.messages import MESSAGES, message_records
from batchmix.output.part_formats import LineParts
from batchmix.output.run_info import messages_column
from batchmix.output.stored_run import open_stored
from batchmix.storage import last_component

_SAMPLE_ROWS = 10_000  # lines of JSON whose values say what types the columns have


class Results:
    """The records of the run in `url`, an output.dir. BatchmixError where there is none.

    `task` and `answer` are those of `batchmix annotate`; `answer` is None where the run had no task.
    """

    def __init__(self, url: str) -> None:
        self._parts, self.run = open_stored(url)
        self.storage = self._parts.storage
        self.url = self.storage.url
        self.task = AnnotateConfig(**self.run["config"].get("annotate", {}))
        self.answer: Answer | None = answer_of(self.task)
        self.names = self._parts.names()

    @property
    def title(self) -> str:
        return last_component(self.storage)

    @property
    def complete(self) -> bool:
        return is_finished(self.storage)

    @cached_property
    def schema(self) -> pa.Schema:
        """Of the records; of JSON lines, as a sample and the task say."""
        if not self.names:
            raise BatchmixError(f"output.dir={self.url}: holds no rows yet")
        stated = self._parts.schema(self.names[0])
        if stated is not None:
            return stated
        columns = annotation_columns(self.task)
        known = {field.name: field for field in [*FIRST, *LAST, *(columns.schema if columns else [])]}
        sample = list(islice((row for rows in self._lines() for row in rows), _SAMPLE_ROWS))
        found = [known.get(field.name, field) for field in settle(infer_schema(sample))]
        messages = messages_column(self.run)
        return pa.schema([
            field.with_type(MESSAGES) if field.name == messages and field.metadata == LOOSE else field
            for field in found
        ])  # fmt: skip

    def column_of(self, name: str) -> str | None:
        """What the input's column `name` is called in the records: `input_<name>` where the name is one of ours, but for an
        `id` that fills ours."""
        if name == ID == self.run["identity"].get("id_column"):
            return name
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
        if isinstance(self._parts.format, LineParts):
            schema = pa.schema([self.schema.field(name) for name in columns])
            for rows in self._lines():
                yield _table(rows, schema, self.url)
            return
        for name in self.names:
            yield from self._parts.batches(name, columns)

    def _lines(self) -> Iterator[list[dict[str, Any]]]:
        form = self._parts.format
        assert isinstance(form, LineParts)
        for name in self.names:
            yield from map(form.rows, self._parts.batches(name))


def _table(rows: list[dict[str, Any]], schema: pa.Schema, url: str) -> pa.Table:
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if field.type == MESSAGES:
            values = [message_records(value) for value in values]
        elif field.metadata == LOOSE:
            values = [as_json_text(value) for value in values]
        try:
            columns.append(pa.array(values, field.type))
        except pa.ArrowException as error:
            raise BatchmixError(f"output.dir={url}: column {field.name!r} holds values of several types ({error});"
                                " run with output.format=arrow, whose parts state them") from None  # fmt: skip
    return pa.Table.from_arrays(columns, schema=schema)
