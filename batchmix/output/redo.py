"""`output.redo`: rows that ended a certain way are run again with the settings of today, and replaced.

The new rows are committed to the subfolder `.batchmix/redo`, which is a ledger like the output folder itself; once all are there
the old ones are exchanged for them as one change.
"""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from batchmix.input.rowset import RowSet
from batchmix.output.config import Redo
from batchmix.output.exchange import exchange
from batchmix.output.lease import lost
from batchmix.output.parts import Parts
from batchmix.storage.bookkeeping import REDO


def rows_to_redo(parts: Parts, redo: Redo) -> RowSet:
    """The rows of which any sample has that finish_reason."""
    rows = RowSet()
    for keys in parts.all_keys(parts.names()):
        rows.add_many(keys.row[pc.equal(keys.finish_reason, redo.value).to_numpy(zero_copy_only=False)])
    return rows


def replace_rows(parts: Parts, generation: int) -> None:
    """Put the rows of the parts in REDO in the place of the same rows in the committed parts.

    `generation`: of the lease FINALIZE, which the caller holds.
    """
    storage = parts.storage
    staged = parts.names(f"{REDO}/")
    rows = parts.rows(staged)
    kept = f"{REDO}/kept-{generation:06}/"  # what remains of old parts
    storage.make_folder(kept)
    number = parts.next_number()
    removed: list[str] = []
    names = parts.names()
    for name, keys in zip(names, parts.all_keys(names), strict=True):
        keep = np.flatnonzero([row not in rows for row in keys.row.tolist()])
        if len(keep) == len(keys):
            continue
        removed.append(name)
        if len(keep):
            records = parts.format.take(parts.format.join(list(parts.batches(name))), keep)
            staged.append(parts.name(0, number, kept))
            number += 1
            if not parts.create(staged[-1], records):
                raise lost(storage, "the whole")
    exchange(storage, generation, REDO, staged, removed)
