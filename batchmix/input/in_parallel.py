"""Many small requests of an input store at once: one at a time, a thousand footers take minutes from an object store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
_THREADS = 16
THREAD_NAME = "in-parallel"


def in_parallel(function: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """`function` of each item, in order; raises what it raises for the first item that fails."""
    if len(items) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix=THREAD_NAME) as pool:
        return list(pool.map(function, items))
