"""One model that answers units of rows for a driver, in a process of its own or in a Ray actor."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from batchmix import __version__
from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.config import Config
from batchmix.distributed.executor import traced
from batchmix.distributed.tensor_parallel import print_last_words, tensor_parallel
from batchmix.engine.build import start_engine
from batchmix.errors import BatchmixError
from batchmix.observability.engine_stats import EngineStats
from batchmix.planning.in_flight import InFlight
from batchmix.records import Batch, Completion, InputRow
from batchmix.stages import Prompts, buffers_of, planned_batches

_REPORT_EVERY = 0.5  # seconds
_REPORT_ROWS = 256


@dataclass
class Report:
    """What a worker has done so far."""

    stats: EngineStats = field(default_factory=EngineStats)
    seconds: dict[str, float] = field(default_factory=dict)  # of StageClock
    device_seconds: float | None = None  # of DeviceClock, once it has ended; None on a CPU

    @property
    def busy_seconds(self) -> float:
        """In which the device worked, by the host's clock where it has none of its own."""
        if self.device_seconds is not None:
            return self.device_seconds
        return self.seconds.get("prefill", 0.0) + self.seconds.get("decode", 0.0)


WorkerOutput = tuple[list[Completion], Report]


class EngineWorker:
    """Two threads call it: `feed` and `stop` may come while `run` is at work."""

    def __init__(
        self, config: Config, give_up: Callable[[BatchmixError], None] = print_last_words, trace_name: str = ""
    ) -> None:
        """`give_up`: see `tensor_parallel`."""
        self._config, self._give_up, self._trace_name = config, give_up, trace_name
        self._units: SimpleQueue[list[InputRow] | None] = SimpleQueue()
        self._opened = ExitStack()
        self.stopped = False  # no rows will come

    def load(self, version: str, model: str) -> str | None:
        """Load the model; returns the fingerprint of its weights. BatchmixError where this node has another batchmix or
        another model than the driver."""
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
        self._prompts = Prompts.open(config, checkpoint)
        tp, self._tp_workers = self._opened.enter_context(tensor_parallel(config, self._give_up))
        tokenizer, grammars = self._prompts.tokenizer, self._prompts.grammars
        self._engine = start_engine(checkpoint, tokenizer, config.engine, lambda: self.stopped, tp, grammars)
        self._opened.enter_context(traced(config, self._engine, self._trace_name))
        return self._engine.model.weights.fingerprint

    def feed(self, rows: list[InputRow]) -> None:
        """Rows to answer: by the `run` that is at work, or by the next."""
        self._units.put(rows)

    def stop(self) -> None:
        """End `run` after its step, with the rows that are whole by then."""
        self.stopped = True
        self._units.put(None)

    def __enter__(self) -> EngineWorker:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._opened.__exit__(*error)  # which knows better why a rank's collective fails

    def run(self, wait: bool = False) -> Iterator[WorkerOutput]:
        """The answers, without the input's columns, as they come. Ends when all rows that were there are answered;
        `wait`: for the first of them."""
        engine = self._engine
        answered: list[Completion] = []
        last = time.monotonic()
        in_flight = InFlight(buffers_of(self._config).in_flight)
        for completion in engine.generate(self._tp_workers.broadcast(self._batches(in_flight, wait))):
            in_flight.completed(completion)
            answered.append(completion)
            if len(answered) >= _REPORT_ROWS or time.monotonic() - last > _REPORT_EVERY:
                yield answered, Report(engine.stats, engine.clock.seconds)
                answered, last = [], time.monotonic()
        yield answered, Report(engine.stats, engine.clock.seconds, engine.read_totals())

    def _batches(self, in_flight: InFlight, wait: bool) -> Iterator[Batch]:
        """One unit after the other, so that slots are refilled from the next one while the last rows of one still run."""
        while True:
            try:
                rows = self._units.get(block=wait)
            except Empty:  # waiting for more would hold up the rows that run
                return
            if rows is None:
                return
            wait = False
            yield from planned_batches(self._config, [], self._prompts, self._engine, rows, in_flight)
