"""Progress over a checkpoint's bytes: a bar where a person looks at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import time

from tqdm import tqdm

_log = logging.getLogger(__name__)
_FIRST_LINE, _LINE_EVERY = 5.0, 30.0  # seconds


class LoadProgress:
    """Shows how far a checkpoint of `num_bytes` bytes and `elements` elements is read or written. A context manager.

    Of a run's several processes the first has the bar; lines go wherever each one's log goes.
    """

    def __init__(self, what: str, num_bytes: int, elements: int) -> None:
        self._what = what
        self._num_bytes = num_bytes
        self._bytes_per_element = num_bytes / max(1, elements)
        self._bytes = 0.0
        self._started = time.monotonic()
        self._next_line = self._started + _FIRST_LINE
        shown = sys.stderr.isatty() and multiprocessing.parent_process() is None
        self._bar = tqdm(desc=what, total=num_bytes, unit="B", unit_scale=True, dynamic_ncols=True) if shown else None

    def count(self, elements: int) -> None:
        """So many elements more are through."""
        self._bytes += elements * self._bytes_per_element
        if self._bar is not None:
            self._bar.update(round(self._bytes) - self._bar.n)
        elif time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY
            _log.info("%s", self.line())

    def line(self) -> str:
        """`loading weights: 31.2 of 93.4 GB (33 %), 2.31 GB/s`"""
        seconds = max(time.monotonic() - self._started, 1e-3)
        share = self._bytes / max(1, self._num_bytes)
        return (f"{self._what}: {self._bytes / 1e9:.1f} of {self._num_bytes / 1e9:.1f} GB ({share:.0%}),"
                f" {self._bytes / 1e9 / seconds:.2f} GB/s")  # fmt: skip

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
