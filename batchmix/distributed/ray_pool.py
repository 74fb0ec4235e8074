"""`cluster=ray`: models in the actors of a Ray cluster, which answer units of rows as fast as each can.

The driver reads the rows, cuts them into units, and gives the next unit to whichever worker has least left to do. It
alone writes the output, so a row that comes twice, or from a node that was given up, cannot be committed twice. What a
lost worker has not answered goes to the others. The cluster decides where workers run and, where it scales by itself,
how many nodes there are: a worker without a node is what asks it for one.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from batchmix import __version__
from batchmix.checkpoints.checkpoint import Checkpoint
from batchmix.config import Config
from batchmix.distributed.data_parallel import Report
from batchmix.distributed.ray_worker import RayWorker
from batchmix.engine.config import Backend
from batchmix.errors import BatchmixError
from batchmix.input.source import Source
from batchmix.observability.clock import StageClock
from batchmix.observability.engine_stats import EngineStats
from batchmix.observability.metrics import Metrics
from batchmix.observability.progress import Progress
from batchmix.observability.summary import RunStatistics
from batchmix.output.output_folder import OutputFolder
from batchmix.output.run_info import accept_weights
from batchmix.prompts.buffers import take
from batchmix.prompts.tokenizer import Tokenizer
from batchmix.records import Completion, InputRow
from batchmix.signals import StopSignals
from batchmix.stages import buffers_of, check_error, make_sink, progress_of

_LOOK_EVERY = 5.0  # seconds, at what the cluster has
_PAUSE = 0.2  # seconds, at most, before a signal is noticed
# A run ends once so many workers in a row were lost, in so many seconds, and no row was answered. Ray may for some time
# put new ones on a node that it does not know to be gone.
_MOST_LOSSES, _PATIENCE = 5, 120.0
_SAY_EVERY = 30.0  # seconds without a worker

_log = logging.getLogger(__name__)


def run_on_ray(
    config: Config,
    source: Source,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    output: OutputFolder,
    signals: StopSignals,
    rows: Iterator[InputRow],
) -> RunStatistics:
    """The run in a Ray cluster, as its user sees it; this process reads the rows and writes the answers."""
    clock, started = StageClock(), time.monotonic()
    signals.defer()
    with (
        RayPool(config, checkpoint.fingerprint(), partial(accept_weights, output.storage)) as pool,
        Progress(source.shard_rows, output.num_done, pool.stats) as progress,
        Metrics(output.storage, pool.stats, progress.totals, config.shard.index),
        make_sink(config, output.log(source.new_extents), tokenizer, clock) as sink,
    ):
        output.report(partial(progress_of, source, progress.totals))
        for completion in pool.answer(rows, source.schema.names, signals.stopping, clock):
            check_error(config, completion)
            sink.write(completion)
            progress.count(completion)
    return RunStatistics(progress.totals, pool.stats, clock, time.monotonic() - started, pool.device_seconds)


@dataclass(eq=False)
class _Worker:
    """An actor, seen from the driver."""

    actor: Any
    loading: Any  # what to wait for until the model is loaded; None afterwards
    answers: Any = None  # the stream of a `run` at work
    rows: dict[int, InputRow] = field(default_factory=dict)  # given and not answered
    unit_rows: int = 0  # of the unit that was given last
    samples: dict[int, list[Completion]] = field(default_factory=dict)  # of rows that miss some
    report: Report = field(default_factory=Report)


class RayPool:
    """A context manager: connects to Ray, or starts it on this machine; no actor is left at the end of the block."""

    def __init__(self, config: Config, model: str, accept: Callable[[str | None], None]) -> None:
        self._config, self._model, self._accept = config, model, accept
        self.stats = EngineStats()
        self._max_bytes = buffers_of(config).in_flight
        self._workers: list[_Worker] = []
        self._all: list[_Worker] = []  # those that are gone, too
        self._unit: list[InputRow] = []  # the next to be given; empty: none is left
        self._back: list[InputRow] = []  # of lost workers
        self._losses, self._answered = 0, time.monotonic()
        self._looked = float("-inf")
        self._said = time.monotonic()

    def __enter__(self) -> RayPool:
        try:
            import ray
        except ImportError:
            raise BatchmixError("cluster=ray: needs Ray; pip install 'batchmix[cluster]'") from None
        address = self._config.cluster.address
        ours = signal.getsignal(signal.SIGTERM)  # ray.init puts its own in the place
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BatchmixError(
                f"cluster.address={address}: no Ray cluster there ({' '.join(str(error).split())})"
            ) from None
        finally:
            signal.signal(signal.SIGTERM, ours)
        self._ray = ray
        self._gpus = self._gpus_per_worker()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers):
            self._dismiss(worker)
        self._ray.shutdown()

    @property
    def device_seconds(self) -> float:
        """In which the device of an average worker worked."""
        busy = [worker.report.busy_seconds for worker in self._all]
        return sum(busy) / max(1, len(busy))

    def answer(
        self, rows: Iterator[InputRow], keep: Sequence[str], stopping: Callable[[], bool], clock: StageClock
    ) -> Iterator[Completion]:
        """Every sample of every row, with the columns `keep` and a row's samples together. Ends early when `stopping()`.

        `clock` gets the driver's reading, and the workers' stages at the end.
        """
        self._rows, self._clock = rows, clock
        self._unit = self._next_unit()
        while not stopping():
            self._grow()
            self._feed()
            if not self._unit:  # who has nothing left is not needed any more, and may cost money
                for worker in [worker for worker in self._workers if not worker.rows]:
                    self._dismiss(worker)
                if not self._workers:
                    break
            waited = {worker.answers if worker.loading is None else worker.loading: worker for worker in self._workers}
            waited.pop(None, None)
            if not waited:  # all are lost, and new ones come with the next look
                time.sleep(_PAUSE)
                continue
            ready, _ = self._ray.wait(list(waited), num_returns=len(waited), timeout=_PAUSE)
            for reference in ready:
                for completion in self._hear(waited[reference]):
                    columns = waited[reference].rows[completion.prompt.row].columns
                    completion.prompt.columns = {name: columns[name] for name in keep if name in columns}
                    yield from self._whole_row(waited[reference], completion)
            self.stats.sum_up(worker.report.stats for worker in self._all)
        for worker in self._all:
            for stage, seconds in worker.report.seconds.items():
                clock.add(stage, seconds)

    def _next_unit(self) -> list[InputRow]:
        size = self._config.cluster.rows_per_unit
        with self._clock.stage("read"):
            unit, self._back = self._back[:size], self._back[size:]
            # All workers have two units each at most, and as many wait here as one has.
            workers = max(1, len(self._workers), self._config.cluster.workers or 1)
            return unit or take(self._rows, size, self._max_bytes // (2 * workers + 1))

    def _grow(self) -> None:
        """As many workers as may be and as there is work for; those that find no node yet wait for one in Ray."""
        now = time.monotonic()
        if not self._unit or now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        cluster, there = self._config.cluster, self._ray.cluster_resources()
        room = there.get("GPU", 0) // self._gpus if self._gpus else there.get("CPU", 0) // cluster.cpus_per_worker
        wanted = max(1, int(room)) if cluster.workers is None else cluster.workers
        remote = self._ray.remote(RayWorker).options(
            num_gpus=self._gpus, num_cpus=cluster.cpus_per_worker, max_concurrency=2, scheduling_strategy="SPREAD"
        )
        while len(self._workers) < wanted:
            actor = remote.remote(self._config)
            worker = _Worker(actor, actor.load.remote(__version__, self._model))
            self._workers.append(worker)
            self._all.append(worker)
        if all(worker.loading is not None for worker in self._workers) and now - self._said > _SAY_EVERY:
            needed = f"{self._gpus} GPUs" if self._gpus else f"{cluster.cpus_per_worker} CPUs"
            _log.info("waiting for a first worker of %s; the cluster has %g GPUs and %g CPUs", needed,
                      there.get("GPU", 0), there.get("CPU", 0))  # fmt: skip
            self._said = now

    def _feed(self) -> None:
        """The next unit to each that is about to run dry, who has least first."""
        loaded = [worker for worker in self._workers if worker.loading is None]
        for worker in sorted(loaded, key=lambda worker: len(worker.rows)):
            if self._unit and len(worker.rows) <= worker.unit_rows // 2:
                worker.actor.feed.remote(self._unit)
                worker.rows |= {row.row: row for row in self._unit}
                worker.unit_rows = len(self._unit)
                self._unit = self._next_unit()
            if worker.rows and worker.answers is None:
                worker.answers = worker.actor.run.options(num_returns="streaming").remote()

    def _hear(self, worker: _Worker) -> list[Completion]:
        """What a worker that has something to say says. One that is lost says nothing."""
        from ray.exceptions import RayError, RayTaskError

        try:
            if worker.loading is not None:
                self._accept(self._ray.get(worker.loading))
                worker.loading = None
                return []
            reference = next(worker.answers, None)
            if reference is None:
                worker.answers = None
                return []
            completions, worker.report = self._ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, BatchmixError):
                raise BatchmixError(str(cause)) from None
            raise RuntimeError(f"in a worker of Ray:\n{error}") from None
        except RayError as error:
            self._lose(worker, error)
            return []
        if completions:
            self._losses, self._answered = 0, time.monotonic()
        return [completion for completion in completions if completion.prompt.row in worker.rows]

    def _whole_row(self, worker: _Worker, completion: Completion) -> list[Completion]:
        """All samples of the row if this was the last that was missing, else none: a lost worker's row runs again whole."""
        row, num_samples = completion.prompt.row, completion.prompt.sampling.n
        samples = worker.samples.setdefault(row, [])
        samples.append(completion)
        if completion.prompt.error is None and len(samples) < num_samples:
            return []
        del worker.rows[row], worker.samples[row]
        return samples

    def _lose(self, worker: _Worker, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0]
        self._losses += 1
        if self._losses >= _MOST_LOSSES and time.monotonic() - self._answered > _PATIENCE:
            raise BatchmixError(
                f"cluster=ray: {self._losses} workers were lost one after the other and answered nothing; the last: {reason}"
            )
        _log.warning("a worker is lost (%s); others get its %d rows", reason, len(worker.rows))
        self._back += worker.rows.values()
        self._unit = self._unit or self._next_unit()
        self._dismiss(worker)

    def _dismiss(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.rows, worker.samples = {}, {}
        worker.report.stats = replace(worker.report.stats, running=0, waiting=0, kv_blocks_used=0, kv_blocks_total=0)
        self._ray.kill(worker.actor)

    def _gpus_per_worker(self) -> int:
        """0 where the models run on CPUs; with engine.device=auto that is a cluster without GPUs."""
        engine = self._config.engine
        if engine.device == "cpu" or engine.backend is Backend.torch:
            return 0
        if engine.device == "auto" and not self._ray.cluster_resources().get("GPU"):
            return 0
        return self._config.model.tensor_parallel_size
