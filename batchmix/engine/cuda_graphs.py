"""Decode steps as CUDA graphs: which sizes there are, and when one is captured.

A graph fixes what the host decided while it was captured: slots, blocks of a row, and where the slots' tables are.
"""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress

import torch

from batchmix.observability.engine_stats import EngineStats

Queue = Callable[[], None]  # queues the launches of a step
Capture = Callable[[Queue], Queue]

# Rows between two captured sizes. A batch that shrinks by a row every 1.25 steps runs 1.25 d steps at each of n/d
# sizes, with d/2 rows of padding on average: (n/d) C + n 1.25 p d/2 seconds where a capture takes C and a row of
# padding p, least at d = sqrt(2 C / 1.25 p). With p of 4.3 us on an H200 (padding reaches no expert) and C of 15 to 30
# ms, an estimate, d is 75 to 106. 64 rows are also 16 an expert, a step in its tiles.
SPACING = 64
MAX_GRAPHS = 64  # kept at once. Each holds its own launches in device memory; what they work in is one pool for all


def capture_sizes(capacity: int) -> list[int]:
    """Sizes of decode steps, ascending: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, ..., `capacity`.

    A step has fewer than SPACING rows of padding, and at most as many as rows, above 16 half as many.
    """
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, *range(2 * SPACING, capacity, SPACING)]
    return [size for size in sizes if size < capacity] + [capacity]


def pad_to_capture_size(sizes: list[int], rows: int) -> int:
    """The smallest size that holds `rows` rows."""
    return sizes[bisect_left(sizes, rows)]


class StepGraphs:
    """Steps known by a key: run as they are at first, which loads their kernels, from the second time on as graphs.

    `capture` makes a graph of a step without running it; None: there are no graphs, and `prepare` is not called.
    """

    def __init__(self, capture: Capture | None, stats: EngineStats) -> None:
        self._capture = capture
        self._stats = stats
        self._graphs: OrderedDict[Hashable, Queue | None] = OrderedDict()  # None: ran once
        self._tables: Hashable = None

    def prepare(self, key: Hashable, tables: Hashable, step: Queue) -> Queue:
        """The step, or its graph. `tables` names the memory that graphs rely on: with another one they are dropped."""
        assert self._capture is not None
        if tables != self._tables:
            self._graphs.clear()
            self._tables = tables
        if key not in self._graphs:
            self._graphs[key] = None
            return step
        graph = self._graphs[key]
        if graph is None:
            started = time.perf_counter()
            graph = self._graphs[key] = self._capture(step)
            self._stats.graphs_captured += 1
            self._stats.capture_seconds += time.perf_counter() - started
        self._graphs.move_to_end(key)
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        self._stats.graphs_replayed += 1
        return graph


def cuda_capture() -> Capture:
    """Captures into one pool of memory: graphs never run together. As `torch.cuda.graph`, but neither is the device
    waited for nor its memory given back: a capture is work of the host beside the steps queued before."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(step: Queue) -> Queue:
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        collects = gc.isenabled()
        gc.disable()  # what it would free on the device cannot be freed meanwhile
        try:
            with torch.cuda.stream(stream):
                # Other threads may pin memory and copy meanwhile.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    step()
                except BaseException:
                    with suppress(RuntimeError):  # the step's own error is the one to tell of
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        replay: Queue = graph.replay
        return replay

    return capture
