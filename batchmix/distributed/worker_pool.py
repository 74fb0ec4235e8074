"""What the driver of several workers does: it reads the rows, hands them out in units and puts the answers together.

The next unit goes to whichever worker has least left to do. The driver alone writes the output, so a row that comes twice,
or from a worker that was given up, cannot be committed twice. One driver is enough: docs/parallel.md has what was measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchmix.config import Config
from batchmix.distributed.engine_worker import Report, WorkerOutput
from batchmix.observability.clock import StageClock
from batchmix.observability.engine_stats import EngineStats
from batchmix.prompts.buffers import num_bytes, take
from batchmix.records import Completion, InputRow
from batchmix.stages import buffers_of

PAUSE = 0.2  # seconds, at most, before a signal is noticed
_LEAST_UNIT = 16  # rows: units become smaller as the data ends, so that all workers end at about the same time


@dataclass(eq=False)
class PoolWorker:
    """A worker, seen from the driver. `handle` is what a pool reaches it by."""

    handle: Any
    loaded: bool = False
    finishing: bool = False  # it gets nothing more
    rows: dict[int, InputRow] = field(default_factory=dict)  # given and not answered
    unit_rows: int = 0  # of the unit that was given last
    samples: dict[int, list[Completion]] = field(default_factory=dict)  # of rows that miss some
    report: Report = field(default_factory=Report)


class WorkerPool(ABC):
    """An `Executor`; no worker is left at the end of the block. `accept` is told the fingerprint of each one's weights."""

    def __init__(
        self,
        config: Config,
        model: str,
        keep: Sequence[str],
        stopping: Callable[[], bool],
        accept: Callable[[str | None], None],
    ) -> None:
        """`model`: the checkpoint's fingerprint. `keep`: the input's columns that completions carry."""
        self._config, self._model, self._keep = config, model, keep
        self._stopping, self._accept = stopping, accept
        self.stats, self.clock = EngineStats(), StageClock()
        self._max_bytes = buffers_of(config).in_flight
        self._workers: list[PoolWorker] = []
        self._all: list[PoolWorker] = []  # those that are gone, too
        self._pending: deque[InputRow] = deque()  # the next to be given; empty: none is left
        self._pending_bytes = 0
        self._failure: BaseException | None = None  # why a worker ended early, where that ends the run

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: Any) -> bool | None:
        for worker in list(self._workers):
            self._dismiss(worker)
        return None

    @abstractmethod
    def _grow(self) -> None:
        """Start the workers that are wanted and not there."""

    @abstractmethod
    def _send(self, worker: PoolWorker, rows: list[InputRow]) -> None:
        """Give a unit to a worker that is loaded."""

    @abstractmethod
    def _listen(self) -> Iterator[tuple[PoolWorker, WorkerOutput]]:
        """What workers have to say; waits PAUSE for it. Sets `loaded` of those that are."""

    @abstractmethod
    def _kill(self, worker: PoolWorker) -> None: ...

    @property
    def _max_workers(self) -> int:
        """As far as it is known."""
        return max(1, len(self._workers))

    @property
    def device_seconds(self) -> float | None:
        busy = [worker.report.busy_seconds for worker in self._all]
        return sum(busy) / max(1, len(busy))

    def run(self, rows: Iterator[InputRow]) -> Generator[Completion, None, None]:
        self._rows = rows
        self._fill()
        while self._failure is None and not self._stopping():
            self._grow()
            self._feed()
            if not self._pending:  # who has nothing left is not needed any more, and may cost money
                for worker in [worker for worker in self._workers if not worker.rows and not worker.finishing]:
                    worker.finishing = True
                    self._finish(worker)
                if not self._workers:
                    break
            yield from self._answers()
        yield from self._drain()
        if self._failure is not None:
            raise self._failure
        for worker in self._all:
            for stage, seconds in worker.report.seconds.items():
                self.clock.add(stage, seconds)

    def _answers(self) -> Iterator[Completion]:
        """What has come, a row's samples together and with its columns."""
        for worker, (completions, report) in self._listen():
            worker.report = report
            for completion in completions:
                if (row := worker.rows.get(completion.prompt.row)) is None:  # it was given to another
                    continue
                completion.prompt.columns = {name: row.columns[name] for name in self._keep if name in row.columns}
                yield from self._whole_row(worker, completion)
        self.stats.sum_up(worker.report.stats for worker in self._all)

    def _finish(self, worker: PoolWorker) -> None:
        """End a worker that has nothing left."""
        self._dismiss(worker)

    def _drain(self) -> Iterator[Completion]:
        """What workers still answer once the run is asked to stop."""
        return iter(())

    def _fill(self) -> None:
        """Read ahead: a unit for each worker. Together with two units of each that are on their way they keep to the memory
        that rows may take."""
        with self.clock.stage("read"):
            wanted = self._max_workers * self._config.cluster.rows_per_unit - len(self._pending)
            self._put(take(self._rows, wanted, self._max_bytes // 3 - self._pending_bytes))

    def _put(self, rows: Iterable[InputRow]) -> None:
        for row in rows:
            self._pending.append(row)
            self._pending_bytes += num_bytes(row.columns)

    def _next_unit(self) -> list[InputRow]:
        share = len(self._pending) // self._max_workers
        size = max(_LEAST_UNIT, min(self._config.cluster.rows_per_unit, share))
        unit: list[InputRow] = []
        left = self._max_bytes // (3 * self._max_workers)
        while self._pending and len(unit) < size and left > 0:
            unit.append(self._pending.popleft())
            left -= num_bytes(unit[-1].columns)
            self._pending_bytes -= num_bytes(unit[-1].columns)
        return unit

    def _feed(self) -> None:
        """The next unit to each that is about to run dry, who has least first."""
        loaded = [worker for worker in self._workers if worker.loaded and not worker.finishing]
        for worker in sorted(loaded, key=lambda worker: len(worker.rows)):
            if self._pending and len(worker.rows) <= worker.unit_rows // 2:
                unit = self._next_unit()
                self._send(worker, unit)
                worker.rows |= {row.row: row for row in unit}
                worker.unit_rows = len(unit)
                self._fill()

    def _whole_row(self, worker: PoolWorker, completion: Completion) -> list[Completion]:
        """All samples of the row if this was the last that was missing, else none: a lost worker's row runs again whole."""
        row, num_samples = completion.prompt.row, completion.prompt.sampling.n
        samples = worker.samples.setdefault(row, [])
        samples.append(completion)
        if completion.prompt.error is None and len(samples) < num_samples:
            return []
        del worker.rows[row], worker.samples[row]
        return samples

    def _dismiss(self, worker: PoolWorker) -> None:
        self._workers.remove(worker)
        worker.rows, worker.samples = {}, {}
        worker.report.stats.at_rest()
        self._kill(worker)
