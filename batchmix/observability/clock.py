"""Where the time goes: seconds spent in each stage, whichever thread runs it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from batchmix.observability.trace import Trace

T = TypeVar("T")


class StageClock:
    """Adds up the seconds of named stages. Stages of different threads overlap, so their sum may exceed the run's.

    >>> clock = StageClock()
    >>> with clock.stage("read"):
    ...     pass
    """

    def __init__(self) -> None:
        self.trace: Trace | None = None  # where each time of a stage goes as a span, too
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage so far, in the order of their first use."""
        with self._lock:
            return dict(self._seconds)

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` that were measured elsewhere."""
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            ended = time.perf_counter()
            self.add(name, ended - started)
            if self.trace is not None:
                self.trace.span(name, started, ended)

    def wrap(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """`items`, with the time that each takes to come counted."""
        iterator = iter(items)
        perf_counter = time.perf_counter
        total, count = 0.0, 0
        try:
            while True:
                started = perf_counter()
                try:
                    item = next(iterator)
                except StopIteration:
                    total += perf_counter() - started
                    return
                total += perf_counter() - started
                count += 1
                if count % 256 == 0:
                    self.add(name, total)
                    total = 0.0
                yield item
        finally:
            self.add(name, total)
