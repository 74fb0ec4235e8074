"""SIGTERM, SIGUSR1 and SIGUSR2 (Slurm's warning before the time limit; submitit asks for the latter) and Ctrl-C as a
request to stop.
"""

from __future__ import annotations

import signal
from types import FrameType

from batchmix.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopSignals:
    """A context manager. Until `defer` is called a signal raises Interrupted at once, since nothing could be lost;
    from then on it only sets `received`, for the engine to end after its step. A second Ctrl-C always raises.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False

    def __enter__(self) -> StopSignals:
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
