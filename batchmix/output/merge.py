"""What takes all committed parts at once: that each row is there exactly once, and `output.order=input`.

Memory: 20 bytes for each record of a range of rows, one part being written, and a batch of one that is being read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchmix.errors import BatchmixError
from batchmix.output.exchange import exchange
from batchmix.output.lease import lost
from batchmix.output.parts import Parts
from batchmix.storage.bookkeeping import merge_folder

_SHOWN = 5  # rows that a message names
_RANGE_RECORDS = 4_000_000  # records sorted at once
_NOTHING = [np.empty(0, np.int64)], [np.empty(0, np.int32)], [np.empty(0, np.int32)], [np.empty(0, np.int32)]


@dataclass(frozen=True)
class _Part:
    name: str
    records: int
    first: int  # the smallest row
    last: int  # the largest row


@dataclass(frozen=True)
class _Range:
    """All records of a range of rows, in order: which part each is in and where."""

    low: int
    high: int
    row: npt.NDArray[np.int64]
    sample: npt.NDArray[np.int32]
    owner: npt.NDArray[np.int32]
    place: npt.NDArray[np.int32]


def check_once(parts: Parts, num_rows: int) -> None:
    """BatchmixError unless each of the rows 0..num_rows-1 is there, and no sample of any row twice."""
    missing: list[int] = []
    num_missing, checked = 0, 0
    old = _scan_all(parts)
    for found in _sorted_ranges(parts, old):
        row, sample = found.row, found.sample
        starts = np.flatnonzero(np.diff(row, prepend=-1))  # of each row's samples
        expected = np.arange(len(row)) - np.repeat(starts, np.diff(starts, append=len(row)))
        if len(wrong := np.flatnonzero(sample != expected)):
            at = int(wrong[0])
            there_twice = at > 0 and (row[at - 1], sample[at - 1]) == (row[at], sample[at])
            first, second = (old[found.owner[max(0, at + step)]].name for step in (-1, 0))
            what = f"is there twice, in {first} and in {second}" if there_twice else f"lacks samples in {second}"
            raise BatchmixError(f"output.dir={parts.storage.url}: row {row[at]} {what}; delete {second} and run"
                                " the generate command again, which does its rows anew")  # fmt: skip
        high = min(found.high, num_rows)
        gone = np.setdiff1d(np.arange(found.low, high), row[starts], assume_unique=True)
        num_missing += len(gone)
        missing += gone[:_SHOWN].tolist()
        checked = found.high
    num_missing += max(0, num_rows - checked)
    missing += range(checked, min(num_rows, checked + _SHOWN))
    if num_missing:
        shown = ", ".join(map(str, missing[:_SHOWN])) + (", …" if num_missing > _SHOWN else "")
        raise BatchmixError(f"output.dir={parts.storage.url}: {num_missing:,} of {num_rows:,} rows are not done ({shown}); "
                            "run the generate command again for the rest")  # fmt: skip


def merge_in_order(parts: Parts, rows_per_shard: int, generation: int) -> None:
    """Replace the parts by parts in which (row, sample) only grows, from file to file and within each.

    Does nothing where that is so already. Interrupted, it starts again or, once all is written, is finished by
    `finish_exchange`. `generation`: of the lease FINALIZE, which the caller holds. Parts without rows stay: they are
    seals (`batchmix/output/lease.py`).
    """
    if _in_order(parts):
        return
    storage, staging = parts.storage, merge_folder(generation)
    storage.make_folder(staging)
    old = _scan_all(parts)
    number = parts.next_number()
    staged = []
    for records in _sorted_chunks(parts, old, rows_per_shard):
        staged.append(parts.name(0, number, f"{staging}/"))
        if not parts.create(staged[-1], records):
            raise lost(storage, "the whole")
        number += 1
    exchange(storage, generation, staging, staged, [part.name for part in old])


def _in_order(parts: Parts) -> bool:
    last = (-1, -1)
    for keys in parts.all_keys(parts.names()):
        rows = np.concatenate(([last[0]], keys.row))
        samples = np.concatenate(([last[1]], keys.sample))
        grows = (np.diff(rows) > 0) | ((np.diff(rows) == 0) & (np.diff(samples) > 0))
        if not grows.all():
            return False
        last = (int(rows[-1]), int(samples[-1]))
    return True


def _scan_all(parts: Parts) -> list[_Part]:
    """Those that have rows."""
    names = parts.names()
    found = []
    for name, keys in zip(names, parts.all_keys(names), strict=True):
        if len(keys):
            found.append(_Part(name, len(keys), int(keys.row.min()), int(keys.row.max())))
    return found


def _ranges(old: list[_Part]) -> Iterator[tuple[int, int]]:
    """Ranges of rows [low, high) that together hold all, each with about _RANGE_RECORDS records."""
    end = max((part.last for part in old), default=-1) + 1
    total = sum(part.records for part in old)
    step = max(1, end * _RANGE_RECORDS // max(1, total))
    for low in range(0, end, step):
        yield low, min(low + step, end)


def _sorted_ranges(parts: Parts, old: list[_Part]) -> Iterator[_Range]:
    for low, high in _ranges(old):
        rows, samples, owners, places = [], [], [], []
        numbers = [number for number, part in enumerate(old) if part.first < high and part.last >= low]
        for number, keys in zip(numbers, parts.all_keys(old[number].name for number in numbers), strict=True):
            chosen = np.flatnonzero((keys.row >= low) & (keys.row < high))
            rows.append(keys.row[chosen])
            samples.append(keys.sample[chosen])
            owners.append(np.full(len(chosen), number, np.int32))
            places.append(chosen.astype(np.int32))
        if not rows:
            rows, samples, owners, places = _NOTHING
        row, sample = np.concatenate(rows), np.concatenate(samples)
        order = np.lexsort((sample, row))
        yield _Range(low, high, row[order], sample[order], np.concatenate(owners)[order], np.concatenate(places)[order])


def _sorted_chunks(parts: Parts, old: list[_Part], rows_per_shard: int) -> Iterator[Any]:
    for found in _sorted_ranges(parts, old):
        for start in range(0, len(found.row), rows_per_shard):
            stop = start + rows_per_shard
            yield _gather(parts, old, found.owner[start:stop], found.place[start:stop])


def _gather(parts: Parts, old: list[_Part], owner: npt.NDArray[np.int32], place: npt.NDArray[np.int32]) -> Any:
    """The records at `place` of the parts `owner`, in that order."""
    pieces = []
    position = np.empty(len(owner), np.int64)  # of each wanted record in the joined pieces
    found = 0
    for number in np.unique(owner).tolist():
        wanted = np.flatnonzero(owner == number)
        wanted = wanted[np.argsort(place[wanted])]
        offset = 0
        for batch in parts.batches(old[number].name):
            here = place[wanted] - offset
            inside = np.flatnonzero((here >= 0) & (here < len(batch)))
            if len(inside):
                pieces.append(parts.format.take(batch, here[inside].astype(np.int64)))
                position[wanted[inside]] = found + np.arange(len(inside))
                found += len(inside)
            offset += len(batch)
    return parts.format.take(parts.format.join(pieces), position)
