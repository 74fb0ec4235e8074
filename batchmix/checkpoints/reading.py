"""Fills places from a source with several threads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager

import torch

from batchmix.checkpoints.targets import TensorSource, TensorTarget
from batchmix.errors import BatchmixError
from batchmix.observability.loading import LoadProgress

# More threads than cores do not help: benchmarks/bench_load.py --readers 1 2 4 8. A disk is busy with one or two.
READERS = min(8, len(os.sched_getaffinity(0)))


def fill(
    source: TensorSource, places: Mapping[str, TensorTarget], progress: LoadProgress, readers: int = READERS
) -> None:
    """Read every place's tensor and write it there; in the order of the files, each tensor by one thread.

    BatchmixError where a place's tensor is not of its shape. The first error, or an interruption, ends it.
    """
    shapes = source.shapes()
    for name, place in places.items():
        if shapes[name] != place.shape:
            raise BatchmixError(f"tensor {name} is {list(shapes[name])}, not {list(place.shape)}")

    def read(name: str) -> int:
        places[name].write(source.read(name))
        source.release(name)
        return math.prod(shapes[name])

    with _one_torch_thread(), ThreadPoolExecutor(readers, "read-weights") as pool:
        reads = [pool.submit(read, name) for name in shapes if name in places]
        try:
            for done in as_completed(reads):
                progress.count(done.result())
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Torch's own threads off, for those that start here too: a copy by two of them was half as fast as by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
