"""`engine.data_parallel_size`: whole models side by side on this machine, each in a process of its own.

A worker that is lost ends the run: what its GPU did wrong it would do again. The others end their step first, and what they
answered is committed.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

from batchmix import __version__
from batchmix.config import Config
from batchmix.distributed.engine_worker import EngineWorker, WorkerOutput
from batchmix.distributed.worker_pool import PAUSE, PoolWorker, WorkerPool
from batchmix.distributed.workers import Parent, SendLog, Worker
from batchmix.engine.device import nth_device, select_device
from batchmix.output.output_folder import worker_trace_names
from batchmix.records import Completion, InputRow

_PATIENCE = 120.0  # seconds for a worker to end its step, once asked to stop


@dataclasses.dataclass(frozen=True)
class _Loaded:
    fingerprint: str | None  # of the weights


class ProcessPool(WorkerPool):
    """A worker for each of `engine.data_parallel_size`."""

    _speaker: PoolWorker | None = None  # whose log is shown: all say the same, but for errors

    @property
    def _max_workers(self) -> int:
        return self._config.engine.data_parallel_size

    def _grow(self) -> None:
        config, size = self._config, self._max_workers
        trace_names = worker_trace_names(config.shard, size)
        for place in range(len(self._all), size if self._pending else 0):
            device = nth_device(select_device(config.engine).device, place * config.model.tensor_parallel_size)
            engine = dataclasses.replace(config.engine, device=str(device))
            name = f"data-parallel worker {place} of {size}"
            process = Worker(name, _serve, dataclasses.replace(config, engine=engine), self._model, trace_names[place])
            worker = PoolWorker(process)
            self._workers.append(worker)
            self._all.append(worker)

    def _send(self, worker: PoolWorker, rows: list[InputRow] | None) -> None:
        with suppress(OSError):  # it is gone; `_listen` hears why
            worker.handle.send(rows)

    def _listen(self) -> Iterator[tuple[PoolWorker, WorkerOutput]]:
        Worker.wait([worker.handle for worker in self._workers], PAUSE)
        for worker in list(self._workers):
            for message in worker.handle.messages():
                if isinstance(message, BaseException):
                    self._failure = self._failure or message
                elif isinstance(message, logging.LogRecord):
                    self._speaker = self._speaker or worker
                    if worker is self._speaker or message.levelno >= logging.ERROR:
                        logging.getLogger(message.name).handle(message)
                elif isinstance(message, _Loaded):
                    self._accept(message.fingerprint)
                    worker.loaded = True
                else:
                    yield worker, message
            if worker.handle.ended:
                self._dismiss(worker)

    def _finish(self, worker: PoolWorker) -> None:
        if worker.loaded:
            self._send(worker, None)  # it reports once more and ends
        else:
            self._dismiss(worker)

    def _drain(self) -> Iterator[Completion]:
        for worker in list(self._workers):
            self._finish(worker)
        asked = time.monotonic()
        while self._workers and time.monotonic() - asked < _PATIENCE:
            yield from self._answers()

    def _kill(self, worker: PoolWorker) -> None:
        worker.handle.kill()


def _serve(parent: Parent, config: Config, model: str, trace_name: str) -> None:
    """What a worker does: it loads the model and answers what it is given, until None comes."""
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(SendLog(parent, logging.INFO))
    worker = EngineWorker(config, parent.send, trace_name)
    threading.Thread(target=_receive, args=(parent, worker), name="receive", daemon=True).start()
    with worker:
        parent.send(_Loaded(worker.load(__version__, model)))
        while not worker.stopped:
            for answers in worker.run(wait=True):
                parent.send(answers)


def _receive(parent: Parent, worker: EngineWorker) -> None:
    while (rows := parent.receive()) is not None:
        worker.feed(rows)
    worker.stop()
