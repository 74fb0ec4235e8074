"""The engine behind an `LLM`: one call after another, also where one ended early."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Generator, Iterator

import torch

from batchmix.checkpoints.checkpoint import Checkpoint
from batchmix.config import Config
from batchmix.distributed.executor import LocalExecutor
from batchmix.records import Completion, InputRow, RowSamples
from batchmix.signals import KeyboardStop
from batchmix.stages import Prompts

_CLOSED = "this LLM is closed"


class EngineSession:
    """Loads the model at once, and holds it until `close`."""

    def __init__(self, config: Config, checkpoint: Checkpoint, prompts: Prompts) -> None:
        self._config, self._checkpoint, self._prompts = config, checkpoint, prompts
        self._keyboard = KeyboardStop()
        self._stopping = False  # the engine ends after its step
        self._busy = threading.Lock()
        self._current: weakref.ref[Generator[list[Completion], None, None]] | None = None
        self._closed = False
        self._executor: LocalExecutor | None = self._load()

    def _load(self) -> LocalExecutor:
        return LocalExecutor(
            self._config, self._checkpoint, self._prompts, (), lambda: self._stopping or self._keyboard.received,
            lambda fingerprint: None, "",
        ).__enter__()  # fmt: skip

    def check_open(self) -> None:
        """RuntimeError where it is closed."""
        if self._closed:
            raise RuntimeError(_CLOSED)

    def run(self, rows: Iterator[InputRow], prompts: Prompts) -> Generator[list[Completion], None, None]:
        """The samples of each row together, in the order of completion. `prompts` makes prompts of the rows.

        KeyboardInterrupt on Ctrl-C, RuntimeError where another run has not ended or the session is closed before its end.
        """
        run = self._run(rows, prompts)
        self._current = weakref.ref(run)
        return run

    def close(self) -> None:
        """End what runs, and give the memory back."""
        self._closed = True
        if self._current is not None and (run := self._current()) is not None:
            run.close()
        self._unload()

    def _run(self, rows: Iterator[InputRow], prompts: Prompts) -> Generator[list[Completion], None, None]:
        self.check_open()
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this LLM is answering another call; finish its iterator or close it first")
        try:
            self._keyboard.received = self._stopping = False
            self._executor = self._executor or self._load()
            self._executor.prompts = prompts
            completions = self._executor.run(rows)
            ended = False
            try:
                yield from self._whole_rows(completions)
                ended = True
            finally:
                if not ended:
                    self._abort(completions)
        finally:
            self._busy.release()

    def _whole_rows(self, completions: Iterator[Completion]) -> Iterator[list[Completion]]:
        rows = RowSamples()
        while True:
            with self._keyboard:  # not while the caller has the outputs
                completion = next(completions, None)
            if self._keyboard.received:
                raise KeyboardInterrupt
            if completion is None:
                return
            if samples := rows.add(completion):
                yield samples

    def _abort(self, completions: Generator[Completion, None, None]) -> None:
        """Make the engine ready for another run; where ranks share the model, by loading it again when it is needed."""
        self._stopping = True  # nobody waits for a thread that waits for rows
        completions.close()
        if self._executor is None:
            return
        if self._config.model.tensor_parallel_size > 1:
            self._unload()
        else:
            self._executor.abort()

    def _unload(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.__exit__(None, None, None)
            del executor
            gc.collect()  # engine and model hold each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
