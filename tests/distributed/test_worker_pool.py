"""How the driver hands out rows, with workers that are lists in this process."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.config import Config
from batchmix.distributed.config import ClusterConfig
from batchmix.distributed.engine_worker import Report, WorkerOutput
from batchmix.distributed.worker_pool import PoolWorker, WorkerPool
from batchmix.engine.config import EngineConfig
from batchmix.input.config import DataConfig
from batchmix.prompts.buffers import num_bytes
from batchmix.records import Completion, InputRow, Prompt
from batchmix.sampling import SamplingConfig

SAMPLES = 2


class ListPool(WorkerPool):
    """Each worker answers so many samples whenever it is listened to."""

    def __init__(self, config: Config, speeds: list[int], keep: list[str]) -> None:
        super().__init__(config, "model", keep, lambda: False, lambda _: None)
        self.speeds, self.units, self.peak_bytes = speeds, [[] for _ in speeds], 0

    @property
    def _max_workers(self) -> int:
        return len(self.speeds)

    def _grow(self) -> None:
        for place in range(len(self._all), len(self.speeds) if self._pending else 0):
            worker = PoolWorker(handle=(place, []), loaded=True)
            self._workers.append(worker)
            self._all.append(worker)

    def _send(self, worker: PoolWorker, rows: list[InputRow]) -> None:
        place, waiting = worker.handle
        self.units[place].append(len(rows))
        waiting += [(row, sample) for row in rows for sample in range(SAMPLES)]
        held = [row for other in self._workers for row in other.rows.values()] + list(self._pending) + rows
        self.peak_bytes = max(self.peak_bytes, sum(num_bytes(row.columns) for row in held))

    def _listen(self) -> Iterator[tuple[PoolWorker, WorkerOutput]]:
        for worker in list(self._workers):
            place, waiting = worker.handle
            some, waiting[:] = waiting[: self.speeds[place]], waiting[self.speeds[place] :]
            yield worker, ([answer(row, sample) for row, sample in some], Report())

    def _kill(self, worker: PoolWorker) -> None:
        assert not worker.handle[1], "it still had rows"


def answer(row: InputRow, sample: int) -> Completion:
    prompt = Prompt(row.row, row.id, {}, array("i", [1]), SamplingConfig(n=SAMPLES))
    return Completion(prompt, sample, array("i", [row.row]), "stop", num_tokens=1)


def config(rows_per_unit: int, workers: int, **data: Any) -> Config:
    return Config(
        data=DataConfig("x", **data),
        engine=EngineConfig(device="cpu", data_parallel_size=workers),
        cluster=ClusterConfig(rows_per_unit=rows_per_unit),
    )


@settings(deadline=None, max_examples=100)
@given(
    num_rows=st.integers(0, 400),
    speeds=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    rows_per_unit=st.integers(1, 60),
)
def test_every_sample_comes_once_with_its_rows_columns(num_rows: int, speeds: list[int], rows_per_unit: int) -> None:
    pool = ListPool(config(rows_per_unit, len(speeds)), speeds, ["text"])
    rows = (InputRow(number, str(number), {"text": f"t{number}", "not kept": 0}) for number in range(num_rows))
    with pool:
        found = list(pool.run(rows))
    samples = [(completion.prompt.row, completion.sample_index) for completion in found]
    assert sorted(samples) == [(row, sample) for row in range(num_rows) for sample in range(SAMPLES)]
    assert all(completion.prompt.columns == {"text": f"t{completion.prompt.row}"} for completion in found)
    sizes = [size for units in pool.units for size in units]
    assert sum(sizes) == num_rows
    assert max(sizes, default=0) <= max(rows_per_unit, 16)


def test_few_rows_are_shared_by_all_workers() -> None:
    pool = ListPool(config(4096, 4), [1] * 4, [])
    with pool:
        assert len(list(pool.run(InputRow(number, "", {}) for number in range(200)))) == 200 * SAMPLES
    assert all(sum(units) > 200 / 4 / 2 for units in pool.units), pool.units


@pytest.mark.parametrize("large", [1, 50])
def test_rows_on_their_way_keep_to_the_memory_that_they_may_take(large: int) -> None:
    limit = 4 << 20
    pool = ListPool(config(4096, 2, max_buffered_bytes=limit), [7, 7], ["text"])
    with pool:
        found = list(pool.run(InputRow(number, "", {"text": "x" * (large << 10)}) for number in range(2000)))
    assert len(found) == 2000 * SAMPLES
    assert pool.peak_bytes < limit
