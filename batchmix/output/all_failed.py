"""A run whose every row is an error ends with exit code 1: its data or settings are wrong as a whole."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from batchmix.errors import BatchmixError
from batchmix.input.rowset import RowSet
from batchmix.output.part_formats import LineParts
from batchmix.output.parts import Parts


class AllRowsFailed(BatchmixError):
    """The run is complete, and none of its rows could be run."""


def check_not_all_failed(parts: Parts) -> None:
    """AllRowsFailed where a finished run has rows and not one answer. Reads no further than the part of the first answer."""
    rows = RowSet()
    first: tuple[int, str] | None = None  # row and part
    for name in parts.names():
        keys = parts.keys(name)
        if not pc.all(pc.equal(keys.finish_reason, "error"), min_count=0).as_py():
            return
        if len(keys):
            rows.add_many(keys.row)
            first_row = int(np.min(keys.row)), name
            first = first_row if first is None else min(first, first_row)
    if first is not None:
        row, name = first
        raise AllRowsFailed(
            f"output.dir={parts.storage.url}: {len(rows):,} row{'s' * (len(rows) > 1)}, none could be run;"
            f" row {row}: {_error(parts, name, row)}"
            " (mend that, and run with another output.dir or with output.overwrite=true)"
        )


def _error(parts: Parts, name: str, row: int) -> str:
    """Why a row of this part could not be run."""
    for records in parts.batches(name, ["row", "error"]):
        rows = parts.format.rows(records) if isinstance(parts.format, LineParts) else records.to_pylist()
        for record in rows:
            if record["row"] == row and record["error"] is not None:
                return str(record["error"])
    raise AssertionError(f"{name} has no row {row}")
