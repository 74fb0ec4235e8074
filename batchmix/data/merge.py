"""`output.order=input`: the committed parts, rewritten in the order of rows.

Memory: 20 bytes for each record of a range of rows, one part being written, and a batch of one that is being read.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchmix.data.files import atomic_file, exchange
from batchmix.data.parts import Parts

STAGING = "_merge"
_RANGE_RECORDS = 4_000_000  # records sorted at once


@dataclass(frozen=True)
class _Part:
    path: Path
    records: int
    first: int  # the smallest row
    last: int  # the largest row


def merge_in_order(parts: Parts, rows_per_shard: int) -> None:
    """Replace the parts by parts in which (row, sample) only grows, from file to file and within each.

    Does nothing where that is so already. Interrupted, it starts again or, once all is written, is finished by
    `files.finish_exchange`.
    """
    if _in_order(parts):
        return
    folder = parts.folder
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    old = [_scan(parts, path) for path in parts.paths()]
    number = parts.next_number(0)
    staged = []
    for records in _sorted_chunks(parts, old, rows_per_shard):
        path = staging / parts.name(0, number)
        with atomic_file(path) as file:
            parts.format.write(file, records)
        staged.append(path)
        number += 1
    exchange(folder, staging, staged, [part.path for part in old])


def _in_order(parts: Parts) -> bool:
    last = (-1, -1)
    for path in parts.paths():
        keys = parts.keys(path)
        rows = np.concatenate(([last[0]], keys.row))
        samples = np.concatenate(([last[1]], keys.sample))
        grows = (np.diff(rows) > 0) | ((np.diff(rows) == 0) & (np.diff(samples) > 0))
        if not grows.all():
            return False
        last = (int(rows[-1]), int(samples[-1]))
    return True


def _scan(parts: Parts, path: Path) -> _Part:
    row = parts.keys(path).row
    return _Part(path, len(row), int(row.min()), int(row.max()))


def _ranges(old: list[_Part]) -> Iterator[tuple[int, int]]:
    """Ranges of rows [low, high) that together hold all, each with about _RANGE_RECORDS records."""
    end = max(part.last for part in old) + 1
    total = sum(part.records for part in old)
    step = max(1, end * _RANGE_RECORDS // total)
    for low in range(0, end, step):
        yield low, min(low + step, end)


def _sorted_chunks(parts: Parts, old: list[_Part], rows_per_shard: int) -> Iterator[Any]:
    for low, high in _ranges(old):
        rows, samples, owners, places = [], [], [], []
        for number, part in enumerate(old):
            if part.first >= high or part.last < low:
                continue
            keys = parts.keys(part.path)
            chosen = np.flatnonzero((keys.row >= low) & (keys.row < high))
            rows.append(keys.row[chosen])
            samples.append(keys.sample[chosen])
            owners.append(np.full(len(chosen), number, np.int32))
            places.append(chosen.astype(np.int32))
        if not rows:
            continue
        order = np.lexsort((np.concatenate(samples), np.concatenate(rows)))
        owner, place = np.concatenate(owners)[order], np.concatenate(places)[order]
        for start in range(0, len(order), rows_per_shard):
            yield _gather(parts, old, owner[start : start + rows_per_shard], place[start : start + rows_per_shard])


def _gather(parts: Parts, old: list[_Part], owner: npt.NDArray[np.int32], place: npt.NDArray[np.int32]) -> Any:
    """The records at `place` of the parts `owner`, in that order."""
    pieces = []
    position = np.empty(len(owner), np.int64)  # of each wanted record in the joined pieces
    found = 0
    for number in np.unique(owner).tolist():
        wanted = np.flatnonzero(owner == number)
        wanted = wanted[np.argsort(place[wanted])]
        offset = 0
        for batch in parts.format.batches(old[number].path):
            here = place[wanted] - offset
            inside = np.flatnonzero((here >= 0) & (here < len(batch)))
            if len(inside):
                pieces.append(parts.format.take(batch, here[inside].astype(np.int64)))
                position[wanted[inside]] = found + np.arange(len(inside))
                found += len(inside)
            offset += len(batch)
    return parts.format.take(parts.format.join(pieces), position)
