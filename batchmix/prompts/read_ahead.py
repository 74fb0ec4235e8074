"""A generator's items, computed by a thread ahead of the consumer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty
from typing import TypeVar

from batchmix.prompts.buffers import BoundedQueue

T = TypeVar("T")
THREAD_NAME = "read-ahead"
_PATIENCE = 0.5  # seconds between two looks at whether to stop


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


def read_ahead(
    items: Generator[T, None, None],
    depth: int,
    max_bytes: int,
    size_of: Callable[[T], int],
    stopping: Callable[[], bool] = lambda: False,
) -> Generator[T, None, None]:
    """`items` in order, at most `depth` of them, of at most `max_bytes` in all, and one more ready before they are asked for.

    The thread starts with the first item asked for. An exception of `items` is raised in its place. Closing this
    generator waits for the item in work, ends the thread and closes `items`. Once `stopping()`, nobody waits: this ends at
    its next item, which need not be there, and what is in work may be left to the thread, which the process need not outlive.
    """
    queue: BoundedQueue[T | _End] = BoundedQueue(depth, max_bytes)
    closed = threading.Event()

    def run() -> None:
        end = _End()
        try:
            for item in items:
                queue.put(item, size_of(item))
                del item  # whoever takes it holds it alone
                if closed.is_set():
                    break
        except BaseException as error:
            end = _End(error)
        queue.put(end)

    thread = threading.Thread(target=run, name=THREAD_NAME, daemon=True)
    thread.start()
    try:
        while not stopping():
            try:
                item = queue.get(timeout=_PATIENCE)
            except Empty:
                continue
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        closed.set()
        given_up = time.monotonic() + _PATIENCE
        while thread.is_alive() and not (stopping() and time.monotonic() > given_up):
            with suppress(Empty):  # it may be waiting for room in the queue
                queue.get(timeout=0.02)
        if not thread.is_alive():
            items.close()
