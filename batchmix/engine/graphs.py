"""Decode steps as CUDA graphs: which sizes there are, and when one is captured.

A graph replays the launches of one step, so everything that the host decided while it was captured is fixed: how many
slots it runs over, how many blocks of each row it looks at, and where in memory the slots' tables are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable

import torch

Step = Callable[[], None]


def ladder(capacity: int) -> list[int]:
    """Sizes of decode steps, ascending: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ..., `capacity`.

    At most half of a step's slots are free, above 16 a third, and a batch that shrinks captures two graphs each time it
    halves.
    """
    sizes, size = [1, 2, 4, 8], 16
    while size < capacity:
        sizes += [size, size + size // 2]
        size *= 2
    return [size for size in sizes if size < capacity] + [capacity]


def rung(sizes: list[int], active: int) -> int:
    """The smallest size that holds `active` rows."""
    return sizes[bisect_left(sizes, active)]


class StepGraphs:
    """Runs a step that is known by a key: at first as it is, which compiles kernels, from the second time on as a graph.

    `capture` makes a graph of a step without running it; None: there are no graphs, and `run` is not called.
    """

    def __init__(self, capture: Callable[[Step], Step] | None) -> None:
        self._capture = capture
        self._graphs: dict[Hashable, Step | None] = {}  # None: ran once
        self._tables: Hashable = None
        self.num_captured = 0
        self.num_replayed = 0

    @property
    def enabled(self) -> bool:
        return self._capture is not None

    def run(self, key: Hashable, tables: Hashable, step: Step) -> None:
        """Run the step. `tables` names the memory that graphs rely on: those captured with another one are dropped."""
        assert self._capture is not None
        if tables != self._tables:
            self._graphs.clear()
            self._tables = tables
        if key not in self._graphs:
            self._graphs[key] = None
            step()
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._capture(step)
            self.num_captured += 1
        graph()
        self.num_replayed += 1


def cuda_capture() -> Callable[[Step], Step]:
    """Captures into one pool of memory: graphs never run together and leave nothing in it that is read later."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        replay: Step = graph.replay
        return replay

    return capture
