"""Tables that rows share: found again while in use, never overwritten, dropped when nobody wants them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.engine.device_tables import DeviceTableCache


def table(key: int) -> torch.Tensor:
    return torch.full((1 + key % 4, 3), float(key))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=200))
def test_a_table_in_use_keeps_its_place_and_content(steps):
    tables = DeviceTableCache(3, torch.float32, torch.device("cpu"))
    users: list[tuple[int, int]] = []
    for acquire, number in steps:
        if acquire:
            users.append((number, tables.acquire(number, lambda number=number: table(number))))
        elif users:
            tables.release(users.pop(number % len(users))[0])
        for key, first in users:
            assert torch.equal(tables.data[first : first + 1 + key % 4], table(key))
    for key, _ in users:
        tables.release(key)
    assert len(tables.data) <= 4 * (len(steps) + 16)


def test_what_was_used_last_is_kept():
    built = []

    def use(key: int) -> None:
        tables.acquire(key, lambda: built.append(key) or table(key))
        tables.release(key)

    tables = DeviceTableCache(3, torch.float32, torch.device("cpu"))
    for other in range(1, 200):
        use(0)  # between any two others
        use(other)
    assert built.count(0) == 1
    assert len(tables.data) < 100, "unused tables make room"
