"""`cluster=ray`: models in the actors of a Ray cluster.

What a lost worker has not answered goes to the others. The cluster decides where workers run and, where it scales by itself,
how many nodes there are: a worker without a node is what asks it for one.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from batchmix import __version__
from batchmix.distributed.engine_worker import EngineWorker, WorkerOutput
from batchmix.distributed.worker_pool import PAUSE, PoolWorker, WorkerPool
from batchmix.engine.config import CPU_BACKENDS
from batchmix.errors import BatchmixError
from batchmix.install_hint import install_hint
from batchmix.records import InputRow

_LOOK_EVERY = 5.0  # seconds, at what the cluster has
# A run ends once so many workers in a row were lost, in so many seconds, and no row was answered. Ray may for some time
# put new ones on a node that it does not know to be gone.
_MOST_LOSSES, _PATIENCE = 5, 120.0
_SAY_EVERY = 30.0  # seconds without a worker

_log = logging.getLogger(__name__)


@dataclass
class _Actor:
    actor: Any
    loading: Any  # what to wait for until the model is loaded
    answers: Any = None  # the stream of a `run` at work


class RayPool(WorkerPool):
    """Connects to Ray, or starts it on this machine."""

    def __enter__(self) -> RayPool:
        try:
            import ray
        except ImportError:
            raise BatchmixError(f"cluster=ray: needs Ray; {install_hint('cluster')}") from None
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
        self._losses, self._answered = 0, time.monotonic()
        self._looked, self._said = float("-inf"), time.monotonic()
        self._gpus = self._gpus_per_worker()
        return self

    def __exit__(self, *_: Any) -> bool | None:
        super().__exit__()
        self._ray.shutdown()
        return None

    @property
    def _max_workers(self) -> int:
        return max(super()._max_workers, self._config.cluster.workers or 1)

    def _grow(self) -> None:
        """As many workers as may be and as there is work for; those that find no node yet wait for one in Ray."""
        now = time.monotonic()
        if not self._pending or now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        cluster, there = self._config.cluster, self._ray.cluster_resources()
        room = there.get("GPU", 0) // self._gpus if self._gpus else there.get("CPU", 0) // cluster.cpus_per_worker
        wanted = max(1, int(room)) if cluster.workers is None else cluster.workers
        remote = self._ray.remote(EngineWorker).options(
            num_gpus=self._gpus, num_cpus=cluster.cpus_per_worker, max_concurrency=2, scheduling_strategy="SPREAD"
        )
        while len(self._workers) < wanted:
            actor = remote.remote(self._config)
            worker = PoolWorker(_Actor(actor, actor.load.remote(__version__, self._model)))
            self._workers.append(worker)
            self._all.append(worker)
        if not any(worker.loaded for worker in self._workers) and now - self._said > _SAY_EVERY:
            needed = f"{self._gpus} GPUs" if self._gpus else f"{cluster.cpus_per_worker} CPUs"
            _log.info("waiting for a first worker of %s; the cluster has %g GPUs and %g CPUs", needed,
                      there.get("GPU", 0), there.get("CPU", 0))  # fmt: skip
            self._said = now

    def _send(self, worker: PoolWorker, rows: list[InputRow]) -> None:
        worker.handle.actor.feed.remote(rows)

    def _listen(self) -> Iterator[tuple[PoolWorker, WorkerOutput]]:
        for worker in self._workers:
            if worker.rows and worker.handle.answers is None:
                worker.handle.answers = worker.handle.actor.run.options(num_returns="streaming").remote()
        waited = {worker.handle.answers if worker.loaded else worker.handle.loading: worker for worker in self._workers}
        waited.pop(None, None)
        if not waited:  # all are lost, and new ones come with the next look
            time.sleep(PAUSE)
            return
        ready, _ = self._ray.wait(list(waited), num_returns=len(waited), timeout=PAUSE)
        for reference in ready:
            answers = self._receive(waited[reference])
            if answers is not None:
                yield waited[reference], answers

    def _receive(self, worker: PoolWorker) -> WorkerOutput | None:
        """What a worker that has something to say says. One that is lost says nothing."""
        from ray.exceptions import RayError, RayTaskError

        try:
            if not worker.loaded:
                self._accept(self._ray.get(worker.handle.loading))
                worker.loaded = True
                return None
            reference = next(worker.handle.answers, None)
            if reference is None:
                worker.handle.answers = None
                return None
            answers: WorkerOutput = self._ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, BatchmixError):
                raise BatchmixError(str(cause)) from None
            raise RuntimeError(f"in a worker of Ray:\n{error}") from None
        except RayError as error:
            self._lose(worker, error)
            return None
        if answers[0]:
            self._losses, self._answered = 0, time.monotonic()
        return answers

    def _lose(self, worker: PoolWorker, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0]
        self._losses += 1
        if self._losses >= _MOST_LOSSES and time.monotonic() - self._answered > _PATIENCE:
            raise BatchmixError(
                f"cluster=ray: {self._losses} workers were lost one after the other and answered nothing; the last: {reason}"
            )
        _log.warning("a worker is lost (%s); others get its %d rows", reason, len(worker.rows))
        self._put(worker.rows.values())
        self._dismiss(worker)

    def _kill(self, worker: PoolWorker) -> None:
        self._ray.kill(worker.handle.actor)

    def _gpus_per_worker(self) -> int:
        """0 where the models run on CPUs; with engine.device=auto that is a cluster without GPUs."""
        engine = self._config.engine
        if engine.device == "cpu" or engine.backend in CPU_BACKENDS:
            return 0
        if engine.device == "auto" and not self._ray.cluster_resources().get("GPU"):
            return 0
        return self._config.model.tensor_parallel_size
