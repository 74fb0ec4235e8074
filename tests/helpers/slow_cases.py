"""Cases of a test beyond the first few, for the slow suite alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(count: int, cases: Iterable[Any], unpack: bool = False) -> list[Any]:
    """The cases, those after the first `count` marked slow. `unpack`: each is a tuple of the test's arguments.

    >>> [bool(case.marks) for case in slow_after(1, "ab")]
    [False, True]
    """
    return [
        pytest.param(*(case if unpack else (case,)), marks=() if number < count else pytest.mark.slow)
        for number, case in enumerate(cases)
    ]
