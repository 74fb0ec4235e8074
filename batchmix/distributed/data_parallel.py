"""`engine.data_parallel_size`: whole models side by side on this machine, each with a share of the rows.

The parent holds the output folder and its lease, and says what the whole has done: one progress, one summary, one exit
code. Each worker runs the pipeline on the rows of a finer shard and commits them itself; what is done is known by row,
so a rerun may have another number of workers. The lease names the workers' parts too: should one outlive its parent, the
next run seals them, and the worker's commits are refused.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from batchmix.config import Config
from batchmix.distributed.workers import Parent, SendLog, Worker, allow_signals
from batchmix.engine.device import nth_device, select_device
from batchmix.errors import Interrupted
from batchmix.input.config import ShardConfig
from batchmix.input.rowset import Skip
from batchmix.observability.clock import StageClock
from batchmix.observability.engine_stats import EngineStats
from batchmix.observability.totals import Totals
from batchmix.output.output_folder import OutputFolder
from batchmix.signals import StopSignals

_REPORT_EVERY = 0.5  # seconds
_PATIENCE = 120.0  # seconds for a worker to end its step and commit, once asked to stop

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """One worker's part of the run."""

    shard: ShardConfig
    folder: str  # where its parts go
    first_number: int  # of its parts
    run: dict[str, Any]  # what `_run.json` says
    skip: Skip
    first: bool  # of the workers: the one whose log is shown, as the others would say the same


@dataclass
class Report:
    """What a worker, or all of them, have done so far."""

    stats: EngineStats = field(default_factory=EngineStats)
    totals: Totals = field(default_factory=Totals)
    seconds: dict[str, float] = field(default_factory=dict)  # of StageClock
    device_seconds: float | None = None  # of DeviceClock, once it has ended; None on a CPU
    num_rows: int | None = None  # of the whole data set, where known

    @property
    def busy_seconds(self) -> float:
        """In which the device worked, by the host's clock where it has none of its own."""
        if self.device_seconds is not None:
            return self.device_seconds
        return self.seconds.get("prefill", 0.0) + self.seconds.get("decode", 0.0)


class Reports:
    """In a worker: its Report to the parent, from a thread, and once more at the end of the block."""

    def __init__(self, parent: Parent, stats: EngineStats, totals: Totals, clock: StageClock) -> None:
        self._parent, self._stats, self._totals, self._clock = parent, stats, totals, clock
        self.device_seconds: float | None = None
        self.num_rows: int | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def __enter__(self) -> Reports:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        self._report()

    def _run(self) -> None:
        while not self._closed.wait(_REPORT_EVERY):
            self._report()

    def _report(self) -> None:
        totals = dataclasses.replace(self._totals, finish_reasons=dict(self._totals.finish_reasons))
        stats, seconds = dataclasses.replace(self._stats), self._clock.seconds
        self._parent.send(Report(stats, totals, seconds, self.device_seconds, self.num_rows))


def begin_share(parent: Parent, share: Share) -> None:
    """In a worker, once its StopSignals are there: hear signals, and let the parent show what is logged."""
    allow_signals()
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(SendLog(parent, logging.INFO if share.first else logging.ERROR))


class Replicas:
    """The workers, and what they have done together. A context manager: none is left at the end of the block.

    `work(parent, config, share)` is what each runs. Its `stats`, `totals` and `clock` are for progress and summary.
    """

    def __init__(self, work: Callable[[Parent, Config, Share], None], config: Config, run: dict[str, Any],
                 output: OutputFolder) -> None:  # fmt: skip
        self._work, self._config, self._run, self._output = work, config, run, output
        self._workers: list[Worker] = []
        self._reports: dict[Worker, Report] = {}
        self.stats = EngineStats()
        self.device_seconds = 0.0  # of an average worker
        self.num_rows: int | None = None  # of the whole data set, once a worker has read it

    def __enter__(self) -> Replicas:
        size, config = self._config.engine.data_parallel_size, self._config
        for place in range(size):
            device = nth_device(select_device(config.engine).device, place * config.model.tensor_parallel_size)
            engine = dataclasses.replace(config.engine, device=str(device))
            # Row r belongs to the user's shard r % count, and within it to one of `size` finer ones.
            shard = ShardConfig(config.shard.index + config.shard.count * place, config.shard.count * size)
            share = Share(
                shard,
                self._output.folder,
                self._output.first_number,
                self._run,
                self._output.skip,
                first=place == 0,
            )
            name = f"data-parallel worker {place} of {size}"
            self._workers.append(Worker(name, self._work, dataclasses.replace(config, engine=engine), share))
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()

    def run(self, signals: StopSignals, totals: Totals, clock: StageClock) -> None:
        """Until all have ended. `totals` follow what they do; `clock` gets their seconds at the end.

        A signal, or one worker's early end, stops the others, which commit what they have finished. Raises why a worker
        ended early, but where a signal has asked for that.
        """
        failure: BaseException | None = None
        asked: float | None = None
        while running := [worker for worker in self._workers if not worker.ended]:
            Worker.wait(running, 0.2)
            for worker in running:
                for message in worker.messages():
                    if isinstance(message, BaseException):
                        failure = failure or message
                    elif isinstance(message, logging.LogRecord):
                        logging.getLogger(message.name).handle(message)
                    else:
                        self._reports[worker] = message
            self._sum_up(totals)
            if asked is None and (failure is not None or signals.stopping()):
                asked = time.monotonic()
                for worker in running:
                    worker.stop()
            if asked is not None and time.monotonic() - asked > _PATIENCE:
                break
        for report in self._reports.values():
            for stage, seconds in report.seconds.items():
                clock.add(stage, seconds)
            self.device_seconds += report.busy_seconds / len(self._workers)
        if failure is not None and not (signals.stopping() and isinstance(failure, Interrupted)):
            raise failure

    def _sum_up(self, totals: Totals) -> None:
        reports = list(self._reports.values())
        self.stats.sum_up(report.stats for report in reports)
        self.num_rows = next((report.num_rows for report in reports if report.num_rows is not None), None)
        whole = Totals()
        for report in reports:
            whole.add(report.totals)
        vars(totals).update(vars(whole))
