"""How long the device works, by its own clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batchmix.observability.trace import Trace


class DeviceClock:
    """Adds up the time from the first to the last operator of each piece of work, by CUDA events; never waits for them.

    Work that the host queues while the device is still at the last piece counts from where that ends, so gaps between
    pieces show. Gaps within one do not. A CPU has no clock of its own: there `work` does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.trace: Trace | None = None
        self._device = device
        self._on = device.type == "cuda"
        self._seconds = 0.0
        self._steps: dict[int, list[float]] = {}  # size: how many, and their seconds
        self._open: deque[tuple[str, int | None, torch.cuda.Event, torch.cuda.Event]] = (
            deque()
        )  # not known to have ended
        self._free: list[torch.cuda.Event] = []
        self._zero: tuple[torch.cuda.Event, float] | None = None  # an event, and time.perf_counter() when it happened

    @contextmanager
    def work(self, name: str, size: int | None = None) -> Iterator[None]:
        """The operators that the block queues on the current stream; with `size`, one step of that size, see `steps`."""
        if not self._on:
            yield
            return
        if self._zero is None:
            self._zero = self._event(), time.perf_counter()
            self._zero[0].synchronize()
        started = self._event()
        yield
        self._open.append((name, size, started, self._event()))
        while self._open and self._open[0][3].query():  # type: ignore[no-untyped-call]
            self._close(*self._open.popleft())

    def seconds(self) -> float | None:
        """Of all work so far, which is waited for; None on a CPU."""
        if not self._on:
            return None
        torch.cuda.synchronize(self._device)
        while self._open:
            self._close(*self._open.popleft())
        return self._seconds

    def steps(self) -> dict[int, list[float]]:
        """How many steps of each size there were and what they took together in seconds, once `seconds` has waited."""
        return {size: [count, round(seconds, 4)] for size, (count, seconds) in sorted(self._steps.items())}

    def _event(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _close(self, name: str, size: int | None, started: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        took = started.elapsed_time(ended) / 1e3
        self._seconds += took
        if size is not None:
            count, seconds = self._steps.get(size, (0, 0.0))
            self._steps[size] = [count + 1, seconds + took]
        if self.trace is not None and self._zero is not None:
            zero, at = self._zero
            begin = at + zero.elapsed_time(started) / 1e3
            self.trace.span(name, begin, begin + took, thread="device")
        self._free += [started, ended]
