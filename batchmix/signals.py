"""SIGTERM, SIGUSR1 and SIGUSR2 (Slurm's warning before the time limit; submitit asks for the latter) and Ctrl-C as a
request to stop.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from batchmix.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

_interrupted_early = False


@contextmanager
def hear_interrupts() -> Iterator[None]:
    """Hear Ctrl-C from here on, for the seconds that imports take before there are StopSignals.

    Python alone may not: it ignores Ctrl-C where its parent did, as a shell without job control does for what it starts
    in the background, and the KeyboardInterrupt that it raises is dropped where it comes in a finaliser or in a callback
    of a weak reference, of which every import runs some. So it is remembered, too, and StopSignals raise it again.
    """
    global _interrupted_early
    _interrupted_early = False
    old = signal.signal(signal.SIGINT, _interrupt_early)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def _interrupt_early(number: int, frame: FrameType | None) -> None:
    global _interrupted_early
    _interrupted_early = True
    raise KeyboardInterrupt


class StopSignals:
    """A context manager. Until `defer` is called a signal raises Interrupted at once, since nothing could be lost;
    from then on it only sets `received`, for the engine to end after its step. A second Ctrl-C always raises.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False

    def __enter__(self) -> StopSignals:
        if _interrupted_early:
            raise Interrupted(signal.SIGINT.name)
        self._old = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From here on finished work has to be committed before the process ends."""
        self._deferred = True

    def stopping(self) -> bool:
        """Whether a signal has asked for the end."""
        return self.received is not None

    def raise_if_received(self) -> None:
        """Interrupted with the signal's name, if one came."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._deferred:
            raise Interrupted(name)
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or name
