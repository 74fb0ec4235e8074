"""When a step is captured, and the sizes that there are."""

from __future__ import annotations

import pytest

from batchmix.engine import cuda_graphs as graphs_module
from batchmix.engine.cuda_graphs import SPACING, StepGraphs, capture_sizes, pad_to_capture_size
from batchmix.observability.engine_stats import EngineStats


@pytest.mark.parametrize("capacity", [1, 2, 3, 8, 9, 16, 17, 24, 100, 128, 129, 256, 1000, 1024, 4096])
def test_padding_is_bounded(capacity):
    sizes = capture_sizes(capacity)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == capacity
    for rows in range(1, capacity + 1):
        size = pad_to_capture_size(sizes, rows)
        assert rows <= size <= max(1, 2 * rows - 1)
        assert size - rows < SPACING
        if rows > 16:
            assert size <= 1.5 * rows
    assert len(sizes) <= 11 + capacity // SPACING


def test_a_step_is_captured_when_it_comes_again_and_its_tables_are_where_they_were():
    events = []

    def capture(step):
        events.append("capture")
        return lambda: events.append("replay")

    stats = EngineStats()
    graphs = StepGraphs(capture, stats)

    def run(key, tables):
        events.clear()
        graphs.prepare(key, tables, lambda: events.append("step"))()
        return list(events)

    assert run((8, 4), "a") == ["step"]
    assert run((8, 4), "a") == ["capture", "replay"]
    assert run((8, 4), "a") == ["replay"]
    assert run((4, 4), "a") == ["step"]
    assert run((8, 4), "b") == ["step"]  # the graph reads memory that is no longer a table
    assert run((8, 4), "b") == ["capture", "replay"]
    assert (stats.graphs_captured, stats.graphs_replayed) == (2, 3)
    assert stats.capture_seconds > 0


def test_the_graphs_that_were_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(graphs_module, "MAX_GRAPHS", 3)
    graphs = StepGraphs(lambda step: step, stats := EngineStats())
    for key in (1, 2, 3, 1, 4):
        for _ in range(2):
            graphs.prepare(key, None, lambda: None)
    assert stats.graphs_captured == 4
    for key in (1, 3, 4):
        graphs.prepare(key, None, lambda: None)
    assert stats.graphs_captured == 4
    graphs.prepare(2, None, lambda: None)
    graphs.prepare(2, None, lambda: None)
    assert stats.graphs_captured == 5
