"""A run of which too many rows are errors ends with exit code 1 and without `SUCCESS`: its data or settings are wrong."""

from __future__ import annotations

from batchmix.errors import BatchmixError
from batchmix.observability.error_reasons import ErrorReasons
from batchmix.observability.totals import Totals


class TooManyErrors(BatchmixError):
    """The run is finished: every row is there, and too many of them could not be run."""


def too_many_errors(totals: Totals, max_share: float) -> bool:
    """Whether no row of a finished run has an answer, or more than `max_share` of its rows have an error."""
    return _none(totals) or totals.error_rows > max_share * totals.rows


def explain_errors(url: str, totals: Totals, reasons: ErrorReasons, max_share: float) -> str:
    """What is wrong, in one line, with the most common reason and the remedy."""
    found = reasons.most_common()[0]
    example = f"row {found.example_row}: {found.example}"
    if _none(totals):
        return (f"output.dir={url}: {totals.rows:,} row{'s' * (totals.rows > 1)}, none could be run; {example} (mend that, and"
                " run with another output.dir or with output.overwrite=true)")  # fmt: skip
    return (f"output.dir={url}: {totals.error_rows:,} of {totals.rows:,} rows have an error, more than"
            f" data.max_error_share={max_share:g} allows; the most common reason ({found.rows:,} row{'s' * (found.rows > 1)}):"
            f" {example} (mend that and run with another output.dir, or raise data.max_error_share of the command that generates)")  # fmt: skip


def _none(totals: Totals) -> bool:
    return totals.rows > 0 and set(totals.finish_reasons) == {"error"}
