"""`output.redo`: rows that ended a certain way are run again with the settings of today, and replaced.

The new rows are committed to the subfolder `_redo`, which is a ledger like the output folder itself; once all are there
the old ones are exchanged for them as one change.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from batchmix.config import Redo
from batchmix.data.files import atomic_file, exchange
from batchmix.data.parts import Parts
from batchmix.data.rowset import RowSet
from batchmix.data.sink import done_rows

STAGING = "_redo"


def rows_to_redo(parts: Parts, redo: Redo) -> RowSet:
    """The rows of which any sample has that finish_reason."""
    rows = RowSet()
    for path in parts.paths():
        keys = parts.keys(path)
        rows.add_many(keys.row[pc.equal(keys.finish_reason, redo.value).to_numpy(zero_copy_only=False)])
    return rows


def replace_rows(parts: Parts) -> None:
    """Put the rows of the parts in `_redo` in the place of the same rows in the committed parts."""
    staging = parts.folder / STAGING
    rows = done_rows(parts, parts.paths(staging))
    kept = staging / "kept"  # what remains of old parts; an interrupted call may have left some
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    staged = parts.paths(staging)
    number = parts.next_number(0, staging)
    removed: list[Path] = []
    for path in parts.paths():
        row = parts.keys(path).row
        keep = np.flatnonzero([number not in rows for number in row.tolist()])
        if len(keep) == len(row):
            continue
        removed.append(path)
        if len(keep):
            records = parts.format.take(parts.format.join(list(parts.format.batches(path))), keep)
            staged.append(kept / parts.name(0, number))
            number += 1
            with atomic_file(staged[-1]) as file:
                parts.format.write(file, records)
    exchange(parts.folder, staging, staged, removed)
