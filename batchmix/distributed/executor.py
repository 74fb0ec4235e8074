"""What turns the rows of a run into completions: an engine in this process, or workers elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Protocol

from batchmix.checkpoints.checkpoint import Checkpoint
from batchmix.config import Config
from batchmix.distributed.tensor_parallel import tensor_parallel
from batchmix.engine.build import start_engine
from batchmix.engine.engine import Engine
from batchmix.observability.clock import StageClock
from batchmix.observability.engine_stats import EngineStats
from batchmix.observability.trace import Trace
from batchmix.planning.in_flight import InFlight
from batchmix.records import Completion, InputRow
from batchmix.stages import Prompts, buffers_of, planned_batches
from batchmix.storage.layout import open_output


class Executor(Protocol):
    """A context manager, to be left when the last completion has been taken or none is wanted any more."""

    stats: EngineStats
    """Of all engines together; follows them."""
    clock: StageClock
    """Seconds of the stages, of all processes; whole once `run` has ended."""

    def __enter__(self) -> Executor: ...

    def __exit__(self, *error: Any) -> bool | None: ...

    def run(self, rows: Iterator[InputRow]) -> Generator[Completion, None, None]:
        """Every sample of every row. Ends early once the run is asked to stop; BatchmixError where a worker is lost."""

    @property
    def device_seconds(self) -> float | None:
        """In which the device, of an average worker, worked; None where no device has a clock. After `run`."""


class LocalExecutor:
    """An engine in this process, with the other ranks of `model.tensor_parallel_size` beside it."""

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint,
        prompts: Prompts,
        keep: Sequence[str],
        stopping: Callable[[], bool],
        accept: Callable[[str | None], None],
        trace_name: str,
    ) -> None:
        """`keep`: the input's columns that completions carry. `accept` is told the weights' fingerprint. `prompts` may be
        exchanged between runs for others of the same checkpoint."""
        self._config, self._checkpoint, self.prompts, self._keep = config, checkpoint, prompts, keep
        self._stopping, self._accept, self._trace_name = stopping, accept, trace_name

    def __enter__(self) -> LocalExecutor:
        config = self._config
        with ExitStack() as opened:
            tp, self._tp_workers = opened.enter_context(tensor_parallel(config))
            self._engine = start_engine(
                self._checkpoint, self.prompts.tokenizer, config.engine, self._stopping, tp, self.prompts.grammars
            )
            self._accept(self._engine.model.weights.fingerprint)
            opened.enter_context(traced(config, self._engine, self._trace_name))
            self._opened = opened.pop_all()
        self.stats, self.clock = self._engine.stats, self._engine.clock
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._opened.__exit__(*error)

    def run(self, rows: Iterator[InputRow]) -> Generator[Completion, None, None]:
        """Every stage but the engine works in a thread of its own."""
        in_flight = InFlight(buffers_of(self._config).in_flight)
        batches = planned_batches(self._config, self._keep, self.prompts, self._engine, rows, in_flight)
        with closing(batches):
            for completion in self._engine.generate(self._tp_workers.broadcast(batches)):
                in_flight.completed(completion)
                yield completion

    def abort(self) -> None:
        """Drop what a run that ended early has left in the engine, so that another may begin. Not with other ranks."""
        self._engine.abort()

    @property
    def device_seconds(self) -> float | None:
        return self._engine.read_totals()


@contextmanager
def traced(config: Config, engine: Engine, name: str) -> Iterator[None]:
    """With engine.trace, what all threads and the device do goes to the file `name` of output.dir."""
    if not config.engine.trace:
        yield
        return
    with open_output(config.output.dir).local_file(name) as path, Trace(path) as trace:
        engine.clock.trace = engine.runner.device_clock.trace = trace
        yield
