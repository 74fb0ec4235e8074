"""A warning, as early as it is known, where the first rows of a run all fail."""

from __future__ import annotations

import logging

from batchmix.records import Completion

_log = logging.getLogger(__name__)
_ROWS = 256  # the first window that is planned


def warn_of_failed(rows: int, example_row: int, error: str, noun: str = "row") -> None:
    """None of the first rows can be run. `noun`: what the user calls a row."""
    counted = f"{rows:,} {noun}s" if rows > 1 else noun
    _log.warning("none of the first %s could be run; %s %d: %s", counted, noun, example_row, error)


class FirstRows:
    """Watches the first rows that come out of the engine.

    `prompt_errors`: whether rows count whose prompts cannot be made; a job has warned of them before. They come out before
    answers do, so the first rows are then those of the input. `noun`: what the user calls a row.
    """

    def __init__(self, prompt_errors: bool = False, noun: str = "row") -> None:
        self._prompt_errors, self._noun = prompt_errors, noun
        self._failed = 0
        self._over = False

    def count(self, completion: Completion) -> None:
        """One more sample came out of the engine."""
        prompt = completion.prompt
        ignored = prompt.row >= _ROWS if self._prompt_errors else prompt.error is not None
        if self._over or ignored or completion.sample_index > 0:
            return
        self._over = completion.error is None
        self._failed += completion.error is not None
        if self._failed == _ROWS and completion.error is not None:
            self._over = True
            warn_of_failed(_ROWS, completion.prompt.row, completion.error, self._noun)
