"""A data set of the Hugging Face hub, streamed through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from batchmix.errors import BatchmixError
from batchmix.input.arrow_readers import plain, read_batches
from batchmix.input.chunk import Wanted
from batchmix.input.data_file import reading
from batchmix.input.input_files import InputChunk
from batchmix.input.read_log import Extent, ReadLog
from batchmix.input.schema import infer_schema, settle
from batchmix.redact import name_of

_BATCH_ROWS = 1024
_SAMPLE_BATCHES = 10


class HubInput:
    """One split of a hub data set, or of anything else that `datasets` can load by name."""

    openai_batch = False

    def __init__(self, name: str, split: str) -> None:
        import datasets

        self.name, self._split = name_of(name), split
        self.read_log = ReadLog()  # nothing: the fingerprint is of the contents or the commit
        try:
            self._builder = datasets.load_dataset_builder(name)
            self._stream = self._builder.as_streaming_dataset(split=split)
        except Exception as error:  # datasets raises a different class for each of a dozen causes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BatchmixError(
                f"data.path={name}: no file or folder here, and no hub data set with data.split={split} ({reason}); where there is no"
                " network, save it as Parquet where there is one, and give the folder"
            ) from None
        features = self._stream.features
        self._typed = features is not None
        if features is not None:
            self.schema = settle(pa.schema([field.with_type(plain(field.type)) for field in features.arrow_schema]))
        else:
            with reading(name):
                tables = list(islice(self._tables(None), _SAMPLE_BATCHES))
            self.schema = settle(infer_schema(record for table in tables for record in table.to_pylist()))
        self.columns = [(name, self.schema.names)]

    def num_rows(self) -> int | None:
        splits = self._builder.info.splits or {}
        return splits[self._split].num_examples if self._split in splits else None

    def fingerprint(self) -> dict[str, Any]:
        """The hash that `datasets` makes of the data set's files or commit."""
        return {"hub": self.name, "split": self._split, "hash": self._builder.hash}

    def versions(self) -> list[str | None]:
        return []

    def find_change(self, extents: Sequence[Extent], before: Sequence[str | None] | None) -> str | None:
        return None

    def read(self, wanted: Wanted, columns: list[str] | None, limit: int) -> Iterator[InputChunk]:
        batches = (batch for table in self._tables(columns) for batch in table.to_batches())
        for chunk in read_batches(self.name, batches, wanted, limit=limit):
            yield InputChunk(self.name, 0, chunk, self._typed)

    def _tables(self, columns: list[str] | None) -> Iterator[pa.Table]:
        stream = self._stream if columns is None else self._stream.select_columns(columns)
        tables: Iterator[pa.Table] = stream.with_format("arrow").iter(batch_size=_BATCH_ROWS)
        return tables
