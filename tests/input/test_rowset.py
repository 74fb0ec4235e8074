from __future__ import annotations

import doctest

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.input import rowset
from batchmix.input.rowset import AllBut, RowSet

rows = st.lists(st.integers(0, 40_000), max_size=60)


def test_examples() -> None:
    assert doctest.testmod(rowset).failed == 0


@settings(max_examples=100, deadline=None)
@given(first=rows, second=rows, start=st.integers(0, 50_000), count=st.integers(0, 300))
def test_is_a_set(first: list[int], second: list[int], start: int, count: int) -> None:
    done, model = RowSet(first), {*first, *second}
    done.add_many(np.array(second, np.int64))
    assert list(done) == sorted(model)
    assert len(done) == len(model)
    assert all(row in done for row in model)
    assert [row in done for row in range(start, start + count)] == [row in model for row in range(start, start + count)]
    assert done.mask(start, start + count).tolist() == [row in model for row in range(start, start + count)]


def test_takes_any_iterable_and_grows() -> None:
    done = RowSet(row for row in (0, 8192))
    assert 8192 in done
    assert 8191 not in done
    assert 10**12 not in done
    done.add_many(np.array([50_000_000]))
    assert list(done) == [0, 8192, 50_000_000]
    assert len(RowSet()) == 0


@settings(max_examples=50, deadline=None)
@given(wanted=rows, done=rows)
def test_all_but(wanted: list[int], done: list[int]) -> None:
    skipped = AllBut(RowSet(wanted), RowSet(done)).mask(0, 41_000)
    assert np.flatnonzero(~skipped).tolist() == sorted(set(wanted) - set(done))
