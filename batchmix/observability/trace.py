"""`.batchmix/trace.json`: what each thread did when, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

_NAMES = {"MainThread": "engine", "read-ahead": "read and tokenise", "sink": "write"}


class Trace:
    """Spans of time, written as they come, so that memory does not grow with the run. A context manager.

    The format is Chrome's JSON array of events; a reader also takes one whose end is missing, as a killed run leaves it.
    Times are time.perf_counter().
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._lock = threading.Lock()
        self._threads: dict[str, int] = {}
        self._file.write("[")
        self._separator = "\n"

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._file.write("\n]\n")
            self._file.close()

    def span(self, name: str, started: float, ended: float, thread: str | None = None) -> None:
        """`name` took from `started` to `ended` in the calling thread, or in a row of its own called `thread`."""
        with self._lock:
            if self._file.closed:
                return
            row = self._row(thread or threading.current_thread().name)
            self._write(name=name, ph="X", ts=round(started * 1e6, 1), dur=round((ended - started) * 1e6, 1), tid=row)

    def _row(self, thread: str) -> int:
        if thread not in self._threads:
            self._threads[thread] = len(self._threads) + 1
            self._write(name="thread_name", ph="M", tid=self._threads[thread],
                        args={"name": _NAMES.get(thread, thread)})  # fmt: skip
        return self._threads[thread]

    def _write(self, **event: Any) -> None:
        self._file.write(self._separator + json.dumps({**event, "pid": 1}))
        self._separator = ",\n"
