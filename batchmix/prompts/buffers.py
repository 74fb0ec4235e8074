"""How much memory rows on their way may take, and queues that keep to it.

`data.max_buffered_bytes` is shared out between the stages; each holds so many bytes, or one row where that is larger.
"""

from __future__ import annotations

import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from queue import Empty
from typing import Any, Generic, TypeVar

from batchmix.memory import free_bytes
from batchmix.records import InputRow

T = TypeVar("T")
_FREE_SHARE = 0.02
_LEAST, _MOST = 128 << 20, 4 << 30
_RAW_BYTES = 8 << 20  # of texts in one call of the tokenizer, which makes objects of 100 bytes and more of each token
_ITEM_BYTES = 100  # of a Python object of unknown kind: an integer, a date


@dataclass(frozen=True)
class Buffers:
    """Bytes that each stage may hold."""

    raw: int  # rows of one call of the tokenizer, with all their columns
    read_ahead: int  # prompts that wait for the plan
    window: int  # prompts that are sorted
    batch: int  # prompts of a batch
    in_flight: int  # prompts that the engine has
    queued: int  # completions that wait for the sink
    pending: int  # completions of the part that is being filled; the part is as much again while it is written

    @classmethod
    def of(cls, total: int) -> Buffers:
        """`total`: data.max_buffered_bytes."""
        return cls(
            raw=min(total // 16, _RAW_BYTES), read_ahead=total // 8, window=total // 4, batch=total // 16,
            in_flight=total // 4, queued=total // 16, pending=total // 8,
        )  # fmt: skip


def buffered_bytes(given: int | None, processes: int = 1) -> int:
    """`data.max_buffered_bytes` of one of the processes that share this machine; null stands for a share of free memory."""
    if given is None:
        given = int(min(max(_FREE_SHARE * free_bytes(), _LEAST), _MOST))
    return max(1, given // processes)


def num_bytes(value: Any) -> int:
    """About the memory that a value of a column takes, as Python holds it."""
    if isinstance(value, str | bytes | int | float | array) or value is None:
        return sys.getsizeof(value)
    if isinstance(value, Mapping):
        return _ITEM_BYTES + sum(map(num_bytes, value.values())) + _ITEM_BYTES * len(value)
    if isinstance(value, list | tuple):
        if value and all(type(item) is int for item in value):
            return 40 * len(value)
        return _ITEM_BYTES + 8 * len(value) + sum(map(num_bytes, value))
    return _ITEM_BYTES


def take(rows: Iterator[InputRow], max_rows: int, max_bytes: int) -> list[InputRow]:
    """The next `max_rows` rows, or fewer: the last one is that with which they have `max_bytes`."""
    taken: list[InputRow] = []
    size = 0
    while len(taken) < max_rows and size < max_bytes and (row := next(rows, None)) is not None:
        taken.append(row)
        size += num_bytes(row.columns)
    return taken


class BoundedQueue(Generic[T]):
    """A queue of at most `max_items` items with at most `max_bytes` in all; one that is larger is in it alone."""

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self._max_items, self._max_bytes = max_items, max_bytes
        self._items: deque[tuple[T, int]] = deque()
        self._changed = threading.Condition()
        self.bytes = 0  # of the items that are in it
        self.peak_bytes = 0

    def put(self, item: T, size: int = 0) -> None:
        """Wait until there is room for an item of `size` bytes."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(size))
            self._items.append((item, size))
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        return not self._items or (len(self._items) < self._max_items and self.bytes + size <= self._max_bytes)

    def get(self, timeout: float | None = None) -> T:
        """The first item; `queue.Empty` where none came within `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._items:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise Empty
                self._changed.wait(left)
            item, size = self._items.popleft()
            self.bytes -= size
            self._changed.notify_all()
            return item
