"""Other processes of this run on this machine: started, heard, and ended with it.

A worker is a fresh interpreter (`spawn`), as CUDA wants it. It dies with its parent, however that ends. Signals that stop
a run are blocked in it: its parent hears them and ends it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from batchmix.errors import BatchmixError, Interrupted
from batchmix.signals import STOP_SIGNALS


class Parent:
    """A worker's line to the process that started it; `send` may be called from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Hand over anything that can be pickled. An exception says why the worker ends."""
        with self._lock:
            self._connection.send(message)

    def receive(self) -> Any:
        """The next message; waits for it."""
        return self._connection.recv()


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the main module: a new process would import it, and so run a user's script again that has no
    `if __name__ == "__main__":`. Workers need nothing of it."""
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {
        name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__
    }
    main.__spec__ = None  # multiprocessing reads it
    try:
        yield
    finally:
        main.__dict__.update(hidden)


class Worker:
    """A process that runs `function(parent, *arguments)`, a function of a module's top level."""

    def __init__(self, name: str, function: Callable[..., None], *arguments: object) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(function, theirs, arguments), name=name)
        resource_tracker.ensure_running()  # which unblocks signals when `start` is the first to need it
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited
        try:
            with _without_main():
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        theirs.close()
        self.ended = False  # all that it said has been heard, and it is no more

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: object) -> None:
        """Hand over anything that can be pickled; OSError where the worker is gone."""
        self._connection.send(message)

    def messages(self) -> Iterator[Any]:
        """What it has said since the last call, and why it ended early if it did: an exception. Does not wait."""
        gone = not self._process.is_alive()  # asked first: what it said before its end is there then
        explained = False
        try:
            while self._connection.poll():
                message = self._connection.recv()
                explained = explained or isinstance(message, BaseException)
                yield message
        except (EOFError, OSError):  # cut off in the middle of a message, if it was killed then
            pass
        if gone and not self.ended:
            self.ended = True
            if not explained and self._process.exitcode:
                yield BatchmixError(
                    f"{self.name} (process {self.pid}) {_how(self._process.exitcode)};"
                    " what was committed is safe, run the command again for the rest"
                )

    def kill(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.join()

    @staticmethod
    def wait(workers: Sequence[Worker], seconds: float) -> None:
        """Until one of them says something or ends, at most so long."""
        wait(
            [w._process.sentinel for w in workers] + [w._connection for w in workers if w._process.is_alive()], seconds
        )


class SendLog(logging.Handler):
    """Hands log records to the parent, as they are."""

    def __init__(self, parent: Parent, level: int) -> None:
        super().__init__(level)
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._parent.send(record)


def _main(function: Callable[..., None], connection: Connection, arguments: Sequence[object]) -> None:
    parent = Parent(connection)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        try:
            function(parent, *arguments)
        except (BatchmixError, Interrupted) as error:
            parent.send(error)
        except (EOFError, BrokenPipeError):
            raise
        except Exception:
            name = multiprocessing.current_process().name
            parent.send(RuntimeError(f"in {name}:\n{traceback.format_exc()}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _how(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"was killed by {name}" + (", as the kernel does when memory runs out" if name == "SIGKILL" else "")
