"""SIGTERM, SIGUSR1 and SIGUSR2 (Slurm's warning before the time limit; submitit asks for the latter) and Ctrl-C as a
request to stop.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from batchmix.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

_EXIT_REQUEUE = 75
_PATIENCE = 4.0  # seconds from a signal to the end of a process that does not come to hear it
_NUMBERS = frozenset(int(number) for number in STOP_SIGNALS)

_interrupted_early = False
_exits = True


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


class KeyboardStop:
    """Ctrl-C as a request to stop, while the block runs; it may be entered again and again. The first only sets `received`,
    a second raises KeyboardInterrupt.

    Nothing is changed outside the main thread, which alone hears signals, and where the process has a handler of its own.
    """

    def __init__(self) -> None:
        self.received = False
        self._old: Any = None

    def __enter__(self) -> KeyboardStop:
        if threading.current_thread() is threading.main_thread():
            old = signal.getsignal(signal.SIGINT)
            if old in (signal.default_int_handler, _interrupt_early):
                self._old = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)
            self._old = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True


@contextmanager
def no_exit() -> Iterator[None]:
    """Within the block StopSignals never end the process by themselves: it is not theirs, as in a notebook."""
    global _exits
    _exits = False
    try:
        yield
    finally:
        _exits = True


class StopSignals:
    """A context manager. Until `defer` is called a signal raises Interrupted at once, since nothing could be lost;
    from then on it only sets `received`, for the engine to end after its step. A second Ctrl-C always raises.

    Python hears a signal between two of its own instructions. A main thread that waits elsewhere, as for a store that does not
    answer, would hear it minutes later: so the process then ends without it, since what is committed is safe (but see
    `no_exit`).

    Outside the main thread, where Python allows no handlers, nothing is heard.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False
        self._heard = threading.Event()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            self._old: dict[signal.Signals, Any] = {}
            return self
        if _interrupted_early:
            raise Interrupted(signal.SIGINT.name)
        self._watched, self._waking = socket.socketpair()
        self._waking.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._waking.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        self._old = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if not self._old:
            return
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._heard.set()
        self._waking.send(b"\0")
        self._watcher.join()
        self._watched.close()
        self._waking.close()

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

    def _watch(self) -> None:
        """In a thread: each signal comes as a byte, at once, wherever the main thread is."""
        while (number := self._watched.recv(1)[0]) != 0:
            if number in _NUMBERS and not self._heard.wait(_PATIENCE) and _exits:
                name = signal.Signals(number).name
                os.write(
                    sys.__stderr__.fileno() if sys.__stderr__ else 2, f"batchmix: interrupted by {name}\n".encode()
                )
                os._exit(_EXIT_REQUEUE)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._heard.set()
        name = signal.Signals(number).name
        if not self._deferred:
            raise Interrupted(name)
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or name
