"""What the readers of one file yield: the wanted rows of a stretch of it, as Python objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Wanted = Callable[[int, int], npt.NDArray[np.bool_]]
"""`wanted(start, stop)`: which of the rows start..stop-1 are wanted, bool [stop - start]."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be read, and why, in one line."""

    reason: str


Record = dict[str, Any] | BadRecord


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a file: their numbers there, ascending, and what they hold."""

    numbers: Sequence[int]
    records: Sequence[Record]


def everything(start: int, stop: int) -> npt.NDArray[np.bool_]:
    """A `Wanted`: all rows."""
    return np.ones(stop - start, bool)


def wanted_places(wanted: Wanted, start: int, count: int) -> Sequence[int]:
    """Which of the `count` rows from `start` on are wanted, as offsets from `start`."""
    mask = wanted(start, start + count)
    return range(count) if mask.all() else np.flatnonzero(mask).tolist()
