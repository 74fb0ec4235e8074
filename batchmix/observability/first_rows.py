"""A warning, as early as it is known, where the first rows of a run all fail."""

from __future__ import annotations

import logging

from batchmix.records import Completion

_log = logging.getLogger(__name__)
_ROWS = 256  # the first window that is planned


def warn_of_failed(rows: int, example_row: int, error: str) -> None:
    """None of the first rows can be run."""
    _log.warning(
        "none of the first %s could be run; row %d: %s", f"{rows:,} rows" if rows > 1 else "row", example_row, error
    )


class FirstRows:
    """Watches the first rows that the engine answers; prompts that cannot be made are warned of before."""

    def __init__(self) -> None:
        self._failed = 0
        self._over = False

    def count(self, completion: Completion) -> None:
        """One more sample came out of the engine."""
        if self._over or completion.prompt.error is not None or completion.sample_index > 0:
            return
        self._over = completion.error is None
        self._failed += completion.error is not None
        if self._failed == _ROWS and completion.error is not None:
            self._over = True
            warn_of_failed(_ROWS, completion.prompt.row, completion.error)
