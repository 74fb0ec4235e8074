"""Warnings of the prompts of a call that cannot be run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from batchmix.api.outputs import RequestOutput
from batchmix.observability.error_reasons import ErrorReasons
from batchmix.observability.first_rows import FirstRows
from batchmix.records import Completion

_log = logging.getLogger(__name__)


class FailedPrompts:
    """Counts the prompts of a call and those that failed."""

    def __init__(self) -> None:
        self._first = FirstRows(prompt_errors=True, noun="prompt")
        self._reasons = ErrorReasons()
        self._prompts = self._failed = 0

    def count(self, samples: list[Completion], output: RequestOutput) -> None:
        """One more prompt has come back. Warns at once where the first prompts all fail."""
        self._prompts += 1
        self._first.count(samples[0])
        if output.error is not None:
            self._failed += 1
            self._reasons.add(samples[0].prompt.row, output.error)

    def warn(self) -> None:
        """One line where prompts failed: how many of those that came back, and the most common reason."""
        if self._failed:
            example = self._reasons.most_common()[0]
            _log.warning(
                "%s of %s prompts could not be run; prompt %d: %s (output.error has the reason of each)",
                f"{self._failed:,}", f"{self._prompts:,}", example.example_row, example.example,
            )  # fmt: skip


@contextmanager
def failed_prompts() -> Iterator[FailedPrompts]:
    """Warns at the end of a call, also of one that ends early."""
    failed = FailedPrompts()
    try:
        yield failed
    finally:
        failed.warn()
