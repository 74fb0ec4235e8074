"""Sequences of runs with other numbers of workers, each of which may die or be stopped at any of its writes: promises 1, 2."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchmix.errors import BatchmixError
from batchmix.input.config import ShardConfig
from batchmix.output import finalize
from batchmix.output.columns import OutputColumns
from batchmix.output.config import Order, OutputConfig, OutputFormat
from batchmix.output.lease import CLOSED, Record
from batchmix.output.output_folder import OutputFolder
from batchmix.output.owner import Owner
from batchmix.output.part_formats import part_format
from batchmix.output.parts import Parts
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig
from batchmix.storage import LocalFolder, Storage
from batchmix.storage.bookkeeping import FOLDER, SUCCESS
from batchmix.storage.layout import OldLayout
from batchmix.storage.object_store import ObjectStore

ROWS, PART = 13, 2
WRITES = ("create", "replace", "append", "move", "delete", "delete_folder")
RUN = {"identity": {"model": "m"}, "redone": []}


class Crash(BaseException):
    """The end of a process, which no `except Exception` sees."""


@dataclass(frozen=True)
class Fate:
    """What becomes of a worker at its `at`-th write: before it, or for one that dies perhaps after it."""

    what: str  # die, stop
    at: int
    done: bool = False


class Worker:
    """A worker as a thread, which leaves no trace when it dies. `storage` is what it sees of the store."""

    numbers = itertools.count(1)
    of_thread = threading.local()

    def __init__(self, store: Storage, fate: Fate | None) -> None:
        self.number, self.store, self.fate = next(self.numbers), store, fate
        self.lost = False  # dead, or nobody has heard of it
        self.dead = False
        self.writes = 0
        self.may_go_on = threading.Event()
        self.stopped_or_ended = threading.Event()
        self.errors: list[BaseException] = []

    def __getattr__(self, name: str) -> Any:
        if self.dead:
            raise Crash
        method = getattr(self.store, name)
        return self._writing(method) if name in WRITES else method

    def _writing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any) -> Any:
            mine = self.fate is not None and self.writes == self.fate.at
            self.writes += 1
            if not mine or self.fate is None:
                return method(*args)
            self.lost = True
            if self.fate.what == "stop":
                self.stopped_or_ended.set()
                assert self.may_go_on.wait(60)
                return method(*args)
            if self.fate.done:
                method(*args)
            self.dead = True
            raise Crash

        return write

    def run(self, shard: ShardConfig, order: Order) -> None:
        """Until it has ended or is stopped."""

        def body() -> None:
            self.of_thread.worker = self
            try:
                work(self, shard, order)
            except BatchmixError:
                if not self.lost:
                    self.errors.append(AssertionError("a worker that was well was refused"))
            except Crash:
                pass
            except BaseException as error:
                self.errors.append(error)
            self.stopped_or_ended.set()

        self.thread = threading.Thread(target=body, daemon=True)
        self.thread.start()
        assert self.stopped_or_ended.wait(60)

    def go_on(self) -> None:
        self.may_go_on.set()
        self.thread.join(60)
        assert not self.thread.is_alive()
        if self.errors:
            raise self.errors[0]


def work(storage: Any, shard: ShardConfig, order: Order) -> None:
    """What `pipeline.generate` does with the output."""
    columns = OutputColumns(pa.schema([]), token_ids=False, logprobs=False)
    parts = Parts(storage, part_format(OutputFormat.arrow, columns, None, None))
    output = OutputFolder(OutputConfig(dir="out", order=order, rows_per_shard=3), shard, parts, RUN, None)
    try:
        if output.complete:
            return
        mask = output.skip.mask(0, ROWS)
        rows = [row for row in range(shard.index, ROWS, shard.count) if not mask[row]]
        if rows:
            output.begin()
            log = output.log()
            for start in range(0, len(rows), PART):
                log.commit([answer(row) for row in rows[start : start + PART]])
        output.finish(ROWS)
    finally:
        output.close()


def answer(row: int) -> Completion:
    return Completion(Prompt(row, str(row), {}, [], SamplingConfig()), 0, [], "stop", text="yes")


def committed(store: Storage) -> Counter[int]:
    parts = Parts(store, part_format(OutputFormat.arrow, None, None, None))  # type: ignore[arg-type]
    return Counter(row for name in parts.names() for row in parts.keys(name).row.tolist())


fates = st.builds(Fate, st.sampled_from(["die", "stop"]), st.integers(0, 40), st.booleans())
rounds = st.lists(
    st.integers(1, 4).flatmap(
        lambda count: st.tuples(
            st.permutations(range(count)), st.lists(st.none() | fates, min_size=count, max_size=count)
        )
    ),
    max_size=4,
)


@pytest.fixture(autouse=True)
def owners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads as processes; `lost` as the others see it."""
    workers: dict[int, Worker] = {}

    def this_process() -> Owner:
        worker = Worker.of_thread.worker
        workers[worker.number] = worker
        return Owner("host", worker.number, 0.0, "space")

    monkeypatch.setattr(Owner, "this_process", staticmethod(this_process))
    monkeypatch.setattr(Owner, "here", True)
    monkeypatch.setattr(Owner, "gone", property(lambda self: workers[self.pid].dead))
    monkeypatch.setattr(Record, "lost", lambda self, _: self.state == CLOSED or workers[self.owner.pid].lost)
    monkeypatch.setattr(finalize, "_PATIENCE", 0.001)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nobody cuts the power here


def check(store: Storage, runs: list[Any], last: int, order: Order) -> None:
    stopped: list[Worker] = []
    for places, fates_ in runs:
        for index, fate in zip(places, fates_, strict=True):
            worker = Worker(store, fate)
            worker.run(ShardConfig(index, len(places)), order)
            if worker.errors:
                raise worker.errors[0]
            if not worker.may_go_on.is_set() and worker.thread.is_alive():
                stopped.append(worker)
            assert max(committed(store).values(), default=1) == 1, "a row is there twice"
    for half in (stopped[::2], stopped[1::2]):  # some wake up while nobody is there, others when all is done
        for worker in half:
            worker.go_on()
            assert max(committed(store).values(), default=1) == 1, "a row is there twice"
        for index in range(last):
            worker = Worker(store, None)
            worker.run(ShardConfig(index, last), order)
            worker.go_on()
        assert committed(store) == Counter(range(ROWS))
        assert store.exists(SUCCESS)
    if order is Order.input:
        parts = Parts(store, part_format(OutputFormat.arrow, None, None, None))  # type: ignore[arg-type]
        assert [row for name in parts.names() for row in parts.keys(name).row.tolist()] == list(range(ROWS))


STOPPED_AT_ITS_FIRST_COMMIT = [([0, 1], [Fate("stop", 6), None]), ([0], [None])]
SWEPT_UP_WHILE_IT_MERGED = [([0, 1, 2], [Fate("die", 0), None, None]), ([0, 1, 2], [Fate("stop", 14), None, None])]


@pytest.mark.slow  # seconds under the interpreter, or of processes
@settings(max_examples=8, deadline=None)
@given(runs=rounds, last=st.integers(1, 4), order=st.sampled_from(Order))
@example(STOPPED_AT_ITS_FIRST_COMMIT, 1, Order.completion)
@example(STOPPED_AT_ITS_FIRST_COMMIT, 2, Order.input)
@example(SWEPT_UP_WHILE_IT_MERGED, 1, Order.input)
def test_every_row_once_in_a_folder(runs: list[Any], last: int, order: Order) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(LocalFolder(Path(folder)), runs, last, order)


@pytest.mark.slow  # seconds under the interpreter, or of processes
@settings(max_examples=8, deadline=None)
@given(runs=rounds, last=st.integers(1, 4), order=st.sampled_from(Order))
@example(STOPPED_AT_ITS_FIRST_COMMIT, 2, Order.input)
@example(SWEPT_UP_WHILE_IT_MERGED, 1, Order.input)
def test_every_row_once_in_a_folder_of_the_old_layout(runs: list[Any], last: int, order: Order) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(OldLayout(LocalFolder(Path(folder))), runs, last, order)
        assert not Path(folder, FOLDER).exists()


DIED_WHEN_ALL_WAS_DONE = [([0], [None]), ([0, 1, 2], [None, None, Fate("die", 2)])]


@pytest.mark.slow  # seconds under the interpreter, or of processes
@settings(max_examples=25, deadline=None)
@given(runs=rounds, last=st.integers(1, 4), order=st.sampled_from(Order))
@example(DIED_WHEN_ALL_WAS_DONE, 3, Order.completion)
def test_every_row_once_in_an_object_store(runs: list[Any], last: int, order: Order) -> None:
    check(ObjectStore(f"memory://{next(Worker.numbers)}"), runs, last, order)


@pytest.mark.slow  # the same, long enough to meet most moments; a minute
@settings(max_examples=200, deadline=None)
@given(runs=rounds, last=st.integers(1, 4), order=st.sampled_from(Order), local=st.booleans())
def test_every_row_once_whatever_happens(runs: list[Any], last: int, order: Order, local: bool) -> None:
    if not local:
        check(ObjectStore(f"memory://{next(Worker.numbers)}"), runs, last, order)
        return
    with tempfile.TemporaryDirectory() as folder:
        check(LocalFolder(Path(folder)), runs, last, order)
