"""Costly items, worked on by a thread of their own while others go on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
THREAD_NAME = "aside"


class Aside(Generic[T]):
    """`work(item)` for each item that is put here, one after the other; `take` gives the items back when that is done.

    `work` raises nothing. The thread starts with the first item, and a process need not outlive it.
    """

    def __init__(self, work: Callable[[T], None], capacity: int) -> None:
        self._work, self._capacity = work, capacity
        self._changed = threading.Condition()
        self._waiting: deque[T] = deque()
        self._done: deque[T] = deque()
        self._held = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        """Items that were put here and not taken."""
        return self._held

    @property
    def full(self) -> bool:
        return self._held >= self._capacity

    def put(self, item: T) -> None:
        with self._changed:
            self._waiting.append(item)
            self._held += 1
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
            self._thread.start()

    def take(self, timeout: float = 0.0) -> list[T]:
        """The items that are done; none of them only after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._done, timeout)
            taken = list(self._done)
            self._done.clear()
            self._held -= len(taken)
        return taken

    def close(self) -> None:
        """Let the thread end with the item that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                item = self._waiting.popleft()
            self._work(item)
            with self._changed:
                self._done.append(item)
                self._changed.notify_all()
