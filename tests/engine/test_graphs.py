"""When a step is captured, and the sizes that there are."""

from __future__ import annotations

import pytest

from batchmix.engine.graphs import StepGraphs, ladder, rung


@pytest.mark.parametrize("capacity", [1, 2, 3, 8, 9, 16, 17, 24, 100, 256, 1000, 1024])
def test_every_batch_finds_a_size_that_is_not_much_larger(capacity):
    sizes = ladder(capacity)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == capacity
    for active in range(1, capacity + 1):
        size = rung(sizes, active)
        assert active <= size <= max(1, 2 * active - 1)
        if active > 16:
            assert size <= 1.5 * active
    assert len(sizes) <= 2 * capacity.bit_length() + 1


def test_a_step_is_captured_when_it_comes_again_and_its_tables_are_where_they_were():
    events = []

    def capture(step):
        events.append("capture")
        return lambda: events.append("replay")

    graphs = StepGraphs(capture)

    def run(key, tables):
        events.clear()
        graphs.run(key, tables, lambda: events.append("step"))
        return list(events)

    assert run((8, 4), "a") == ["step"]
    assert run((8, 4), "a") == ["capture", "replay"]
    assert run((8, 4), "a") == ["replay"]
    assert run((4, 4), "a") == ["step"]
    assert run((8, 4), "b") == ["step"]  # the graph reads memory that is no longer a table
    assert run((8, 4), "b") == ["capture", "replay"]
    assert (graphs.num_captured, graphs.num_replayed) == (2, 3)
    assert graphs.enabled
    assert not StepGraphs(None).enabled
