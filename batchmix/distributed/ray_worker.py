"""One model in a Ray actor, which answers units of rows; the driver's side is `ray_pool.py`."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from queue import Empty, SimpleQueue

from batchmix import __version__
from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.config import Config
from batchmix.distributed.data_parallel import Report
from batchmix.distributed.tensor_parallel import tensor_parallel
from batchmix.engine.build import start_engine
from batchmix.errors import BatchmixError
from batchmix.planning.in_flight import InFlight
from batchmix.prompts.tokenizer import load_tokenizer
from batchmix.records import Batch, Completion, InputRow
from batchmix.stages import buffers_of, planned_batches

_REPORT_EVERY = 0.5  # seconds
_REPORT_ROWS = 256


class RayWorker:
    """Two threads call it: `feed` may come while `run` is at work."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._units: SimpleQueue[list[InputRow]] = SimpleQueue()
        self._open = ExitStack()

    def load(self, version: str, model: str) -> str | None:
        """Load the model; returns the fingerprint of its weights. BatchmixError where this node has another batchmix or another model than the driver."""
        config, node = self._config, socket.gethostname()
        if version != __version__:
            raise BatchmixError(
                f"cluster=ray: batchmix is {version} here and {__version__} on {node}; install one version"
            )
        checkpoint = open_checkpoint(config.model)
        if checkpoint.fingerprint() != model:
            raise BatchmixError(
                f"model.path={config.model.path}: on {node} another model lies there than on the driver"
            )
        self._tokenizer = load_tokenizer(checkpoint.folder, config.data.chat_template)
        tp, self._tp_workers = self._open.enter_context(tensor_parallel(config, _give_up))
        self._engine = start_engine(checkpoint, self._tokenizer, config.engine, lambda: False, tp)
        return self._engine.model.weights.fingerprint

    def feed(self, rows: list[InputRow]) -> None:
        """Rows to answer: by the `run` that is at work, or by the next."""
        self._units.put(rows)

    def run(self) -> Iterator[tuple[list[Completion], Report]]:
        """The answers, without the input's columns, as they come. Ends when all rows that were there are answered."""
        engine = self._engine
        answered: list[Completion] = []
        last = time.monotonic()
        in_flight = InFlight(buffers_of(self._config).in_flight)
        for completion in engine.generate(self._tp_workers.broadcast(self._batches(in_flight))):
            in_flight.completed(completion)
            answered.append(completion)
            if len(answered) >= _REPORT_ROWS or time.monotonic() - last > _REPORT_EVERY:
                yield answered, Report(engine.stats, seconds=engine.clock.seconds)
                answered, last = [], time.monotonic()
        device_seconds = engine.read_totals()
        yield answered, Report(engine.stats, seconds=engine.clock.seconds, device_seconds=device_seconds)

    def _batches(self, in_flight: InFlight) -> Iterator[Batch]:
        """One unit after the other, so that slots are refilled from the next one while the last rows of one still run."""
        while True:
            try:
                rows = self._units.get_nowait()
            except Empty:  # waiting for more would hold up the rows that run
                return
            yield from planned_batches(self._config, [], self._tokenizer, self._engine, rows, in_flight)


def _give_up(error: BatchmixError) -> None:
    """A slice of the model is gone and this process hangs on it: it ends, and Ray says so to the driver."""
    print(f"batchmix: error: {error}", file=sys.stderr, flush=True)
    os._exit(1)
