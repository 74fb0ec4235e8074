"""Committed part files: `part-<index>-<number>.<extension>`. Their `row` columns are the ledger of what is done."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from batchmix.errors import BatchmixError
from batchmix.input.read_log import Extent
from batchmix.input.rowset import RowSet
from batchmix.observability.error_reasons import ErrorReasons
from batchmix.observability.totals import Totals
from batchmix.output.checksums import Checksums
from batchmix.output.lease import Record, lost
from batchmix.output.part_formats import Keys, LineParts, PartFormat
from batchmix.records import Completion
from batchmix.storage import Storage, Write, reason_of
from batchmix.storage.bookkeeping import REDO

_NAME = re.compile(r"part-(\d+)-(\d+)\.")
_READERS = 8  # parts read at once: an object store answers slowly, and many


class Parts:
    """The part files of one output folder, in one format. Names end with the folder they are in: "" or `REDO/`.

    Every byte of a part is compared with its checksum when it is first read, but for `check=False`.
    """

    def __init__(self, storage: Storage, form: PartFormat, check: bool = True) -> None:
        self.storage = storage
        self.format = form
        self.checksums = Checksums(storage)
        self._files = cast(Storage, _Checked(storage, self.checksums)) if check else storage

    def unchecked(self) -> Parts:
        """The same for who only wants to know how far a run is."""
        return Parts(self.storage, self.format, check=False)

    def names(self, folder: str = "") -> list[str]:
        """The committed parts, sorted by name."""
        return self.storage.names(f"{folder}part-*.{self.format.extension}")

    def keys(self, name: str) -> Keys:
        """BatchmixError where the file is not what we wrote, as of the next two."""
        with self._reading(name):
            return self.format.keys(self._files, name)

    def schema(self, name: str) -> pa.Schema | None:
        with self._reading(name):
            return self.format.schema(self._files, name)

    def batches(self, name: str, columns: Sequence[str] | None = None) -> Iterator[Any]:
        with self._reading(name):
            yield from self.format.batches(self._files, name, columns)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, ValueError, KeyError, TypeError, OSError) as error:
            raise BatchmixError(
                f"{self.storage.file_url(name)}: cannot be read back ({reason_of(error)}); if the file is damaged, delete it and run the"
                " command again, which does its rows anew"
            ) from None

    def all_keys(self, names: Iterable[str]) -> Iterator[Keys]:
        """Of many parts, in order; a few are read ahead."""
        waiting = iter(names)
        with ThreadPoolExecutor(_READERS) as pool:
            ready = [pool.submit(self.keys, name) for name in islice(waiting, 2 * _READERS)]
            while ready:
                yield ready.pop(0).result()
                ready += [pool.submit(self.keys, name) for name in islice(waiting, 1)]

    def rows(self, names: Iterable[str]) -> RowSet:
        """The rows that these parts hold."""
        rows = RowSet()
        for keys in self.all_keys(names):
            rows.add_many(keys.row)
        return rows

    def totals(self) -> Totals:
        """What all committed parts add up to."""
        totals, failed_rows = Totals(), RowSet()  # of a row, some samples may have failed
        for keys in self.all_keys(self.names()):
            first = keys.sample == 0
            failed = pc.equal(keys.finish_reason, "error").to_numpy(zero_copy_only=False)
            totals.rows += int(first.sum())
            failed_rows.add_many(keys.row[failed])
            totals.samples += int(keys.samples.sum())
            totals.prompt_tokens += int(keys.prompt_tokens[first].sum())
            totals.completion_tokens += int(keys.completion_tokens.sum())
            for entry in pc.value_counts(keys.finish_reason).to_pylist():
                reason = entry["values"]
                totals.finish_reasons[reason] = totals.finish_reasons.get(reason, 0) + entry["counts"]
        totals.error_rows = len(failed_rows)
        return totals

    def error_reasons(self, most_parts: int | None = None) -> ErrorReasons:
        """Why rows of the committed parts have an error. `most_parts`: with errors, that are looked into."""
        reasons, names = ErrorReasons(), self.names()
        failing = (
            name
            for name, keys in zip(names, self.all_keys(names), strict=True)
            if pc.any(pc.equal(keys.finish_reason, "error")).as_py()
        )
        for name in islice(failing, most_parts):
            for row, error in dict(self._errors(name)).items():  # of a row, several samples may have failed
                reasons.add(row, error)
        return reasons

    def _errors(self, name: str) -> Iterator[tuple[int, str]]:
        for records in self.batches(name, ["row", "error"]):
            if isinstance(self.format, LineParts):
                found = self.format.rows(records)
            else:
                found = records.filter(pc.is_valid(records["error"])).to_pylist()
            for record in found:
                if record["error"] is not None:
                    yield record["row"], record["error"]

    def name(self, index: int, number: int, folder: str = "") -> str:
        return f"{folder}part-{index:05}-{number:06}.{self.format.extension}"

    def next_number(self) -> int:
        """One above all that there are, whatever their index and also among rows that are run again."""
        return 1 + max((number for folder in ("", f"{REDO}/") for _, number in self._numbers(folder)), default=-1)

    def create(self, name: str, records: Any, extents: Sequence[Extent] = ()) -> bool:
        """Commit a part, unless there is one of that name. `extents`: what was read of the input and not said before."""
        return self._create(name, lambda file: self.format.write(file, records), extents)

    def _create(self, name: str, write: Write, extents: Sequence[Extent] = ()) -> bool:
        buffer = io.BytesIO()
        write(buffer)
        self.checksums.keep(name, buffer.getvalue(), extents)
        return self.storage.create(name, lambda file: file.write(buffer.getbuffer()))

    def seal(self, lease: Record) -> None:
        """See to it that the lease's holder commits nothing from here on (`batchmix/output/lease.py` says why so)."""
        if lease.first_number is None or not lease.needs_seal(self.storage):
            return
        for index in lease.indices:
            there = [number for found, number in self._numbers(lease.folder) if found == index]
            number = max([lease.first_number, *(number + 1 for number in there)])
            while not self._create(self.name(index, number, lease.folder), self.format.write_empty):
                number += 1

    def _numbers(self, folder: str) -> Iterator[tuple[int, int]]:
        for name in self.names(folder):
            if match := _NAME.search(name):
                yield int(match[1]), int(match[2])


class PartLog:
    """The parts of one index, one after another, by one writer. `check` may say early that it is too late; `read` tells
    what was read of the input since it was last asked.
    """

    def __init__(
        self, parts: Parts, folder: str, index: int, first_number: int, check: Callable[[], None],
        read: Callable[[], list[Extent]] = list,
    ) -> None:  # fmt: skip
        self._parts, self._folder, self._index = parts, folder, index
        self._number = first_number
        self._check, self._read = check, read

    def commit(self, completions: Sequence[Completion]) -> None:
        """Lost where another writer goes on with this index: then these rows are done there."""
        self._check()
        records = self._parts.format.records(completions)
        name = self._parts.name(self._index, self._number, self._folder)
        if not self._parts.create(name, records, self._read()):
            raise lost(self._parts.storage, f"shard index {self._index}")
        self._number += 1


class _Checked:
    """Parts as readers see them: whole, and compared with their checksums when they are first read."""

    def __init__(self, storage: Storage, checksums: Checksums) -> None:
        self._storage, self._checksums = storage, checksums
        self._good: set[str] = set()

    def open(self, name: str) -> IO[bytes]:
        return self._storage.open(name) if name in self._good else io.BytesIO(self._read(name))

    def arrow_file(self, name: str) -> pa.NativeFile:
        return self._storage.arrow_file(name) if name in self._good else pa.BufferReader(self._read(name))

    def _read(self, name: str) -> bytes:
        data = self._storage.read(name)
        self._checksums.check(name, data)
        self._good.add(name)
        return data
