"""`output.dir`: whose it is, what it holds already, and when it is complete."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchmix.config import Order, OutputConfig, ShardConfig
from batchmix.data.files import finish_exchange, write_json
from batchmix.data.lock import FolderLock
from batchmix.data.merge import STAGING as MERGE_STAGING
from batchmix.data.merge import merge_in_order
from batchmix.data.parts import Parts
from batchmix.data.redo import STAGING as REDO_STAGING
from batchmix.data.redo import replace_rows, rows_to_redo
from batchmix.data.rowset import AllBut, RowSet
from batchmix.data.sink import Sink, done_rows
from batchmix.data.tokenizer import Tokenizer
from batchmix.errors import BatchmixError
from batchmix.report.clock import StageClock
from batchmix.report.summary import RunStatistics, Summary
from batchmix.run_info import NAME as RUN_INFO
from batchmix.run_info import accept_run, differences, read_run, record_redo

SUCCESS = "_SUCCESS"
_PARTS = ("part-*.arrow", "part-*.parquet", "part-*.jsonl")
_OURS = (*_PARTS, ".part-*.tmp", "_run.json", "_metrics.jsonl", "_summary*.json", "_evaluation.json", "_trace*.json", "_done-*",
         "_journal.json", SUCCESS)  # fmt: skip
_OUR_FOLDERS = (".hydra", MERGE_STAGING, REDO_STAGING)

_log = logging.getLogger(__name__)


class OutputFolder:
    """One shard's hold on the output folder, from the lock to `finish`.

    `folder` is where this run's parts go: `output.dir`, or its subfolder `_redo`. `skip` has the rows not to run.
    BatchmixError where another process writes there or it holds something else.
    """

    def __init__(self, output: OutputConfig, shard: ShardConfig, parts: Parts, run: dict[str, Any], limit: int | None):
        self.root = self.folder = parts.folder
        self._output, self._shard, self._parts = output, shard, parts
        self._state = {"limit": limit, "order": output.order.value}
        self._make()
        self._lock = FolderLock(self.root, shard)
        try:
            self._check_contents()
            with self._finalizing():
                finish_exchange(self.root)
            self.skip = self._open_redo(run) if output.redo else self._open(run)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, run: dict[str, Any]) -> RowSet:
        with self._finalizing():
            if self._is_void(run):
                self._delete_ours()
            accept_run(self.root, run)
        if (self.root / REDO_STAGING).exists():
            raise BatchmixError(
                f"output.dir={self.root}: rows are being redone there; finish that with output.redo, or delete"
                f" {self.root / REDO_STAGING} to give it up"
            )
        self._remove_temporary(self.root)
        done = done_rows(self._parts, self._parts.paths())
        self.num_done = len(done)
        return done

    def _open_redo(self, run: dict[str, Any]) -> AllBut:
        redo = self._output.redo
        assert redo is not None
        if self._shard.count > 1:
            raise BatchmixError(f"output.redo={redo.value} runs as one process; leave shard.count at 1")
        if not (self.root / RUN_INFO).is_file() or not (self.root / SUCCESS).is_file():
            raise BatchmixError(
                f"output.redo={redo.value}: output.dir={self.root} holds no finished run; finish it first, without output.redo"
            )
        self._redo = {"redo": redo.value, "data.limit": self._state["limit"]} | {
            key: value for key, value in run["identity"].items() if key.startswith("sampling.")
        }
        done_before = read_run(self.root)
        old = {key: value for key, value in done_before["identity"].items() if not key.startswith("sampling.")}
        new = {key: value for key, value in run["identity"].items() if not key.startswith("sampling.")}
        if differing := differences(old, new):
            raise BatchmixError(
                f"output.redo={redo.value}: only sampling.* may differ from the run in {self.root} ({'; '.join(differing)})"
            )
        self.folder = self.root / REDO_STAGING
        wanted = RowSet()
        if self._redo not in done_before["redone"]:
            wanted = rows_to_redo(self._parts, redo)
            self.folder.mkdir(exist_ok=True)
            accept_run(self.folder, {**run, "identity": self._redo | new})
            self._remove_temporary(self.folder)
        else:
            _log.info("rows that ended with %s were redone with these settings before", redo.value)
        redone = done_rows(self._parts, self._parts.paths(self.folder))
        self.num_done = len(redone)
        return AllBut(wanted, redone)

    @property
    def complete(self) -> bool:
        """Whether `_SUCCESS` is there and says that nothing is left for these settings."""
        if self._output.redo is not None:
            return False
        try:
            state = json.loads((self.root / SUCCESS).read_text())
        except (OSError, ValueError):
            return False
        return bool(state == self._state | {"parts": len(self._parts.paths())})

    def begin(self) -> None:
        """Rows will follow: what said that all is there goes. A redo replaces rows at its end, as one change."""
        if self._output.redo is not None:
            return
        (self.root / SUCCESS).unlink(missing_ok=True)
        self._marker(self._shard.index).unlink(missing_ok=True)

    @property
    def lock_descriptors(self) -> tuple[int, int]:
        """Of the files that keep other writers away."""
        return self._lock.descriptors

    def sink(self, tokenizer: Tokenizer | None, clock: StageClock) -> Sink:
        """The sink that commits this run's rows here."""
        return Sink(
            self._parts,
            self.folder,
            self._shard.index,
            tokenizer=tokenizer,
            rows_per_shard=self._output.rows_per_shard,
            flush_seconds=self._output.flush_seconds,
            clock=clock,
        )

    @property
    def trace_path(self) -> Path:
        """Where this shard's trace goes."""
        return trace_path(self.root, self._shard)

    def write_statistics(self, run: RunStatistics) -> None:
        """Keep what this run did for the summary of all shards."""
        write_json(self._statistics(self._shard.index), run.as_json())

    def finish(self) -> Summary | None:
        """All rows of this shard are committed. The last shard to get here puts the whole in order and sums it up."""
        if self._output.redo is not None:
            if self.folder.exists():
                with self._finalizing():
                    replace_rows(self._parts)
                record_redo(self.root, self._redo)
        else:
            rows = done_rows(self._parts, self._parts.paths()).num_of_shard(self._shard.index, self._shard.count)
            write_json(self._marker(self._shard.index), self._state | {"rows": rows})
        with self._finalizing():
            if not self._all_done():
                (self.root / SUCCESS).unlink(missing_ok=True)
                return None
            if self._output.order is Order.input and self._parts.paths():
                merge_in_order(self._parts, self._output.rows_per_shard)
            paths = [self._statistics(index) for index in range(self._shard.count)]
            runs = [json.loads(path.read_text()) for path in paths if path.is_file()]
            summary = Summary(self._parts.totals(), runs)
            summary.write(self.root / "_summary.json")
            write_json(self.root / SUCCESS, self._state | {"parts": len(self._parts.paths())})
        return summary

    def close(self) -> None:
        """Let the next writer in."""
        self._lock.release()

    def _make(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / "_lock").touch()
        except OSError as error:
            raise BatchmixError(f"output.dir={self.root}: cannot be written to ({error.strerror})") from None

    def _check_contents(self) -> None:
        has_run = (self.root / RUN_INFO).exists()
        strange = next((path.name for pattern in _PARTS for path in self.root.glob(pattern)), None)
        if strange is not None and not has_run:
            raise BatchmixError(
                f"output.dir={self.root}: holds {strange} but no {RUN_INFO}, so it is not ours to write to;"
                " choose another output.dir"
            )
        if not self._output.overwrite or not has_run:
            return
        if self._shard.count > 1:
            raise BatchmixError(
                "output.overwrite=true: with shard.count above 1 each shard would delete the others' rows;"
                f" delete {self.root} yourself or choose another output.dir"
            )
        self._delete_ours()

    def _delete_ours(self) -> None:
        for path in [path for pattern in _OURS for path in self.root.glob(pattern)]:
            path.unlink()
        for name in _OUR_FOLDERS:
            shutil.rmtree(self.root / name, ignore_errors=True)

    def _is_void(self, run: dict[str, Any]) -> bool:
        """Whether a run with other settings left no rows here, as one does that is stopped while the model is loaded."""
        if not (self.root / RUN_INFO).exists() or any(path for pattern in _PARTS for path in self.root.glob(pattern)):
            return False
        return bool(differences(read_run(self.root)["identity"], run["identity"])) and self._lock.alone()

    def _remove_temporary(self, folder: Path) -> None:
        """What a killed run was writing. Only this shard's and its workers': others may be at work."""
        for path in folder.glob(".part-*.tmp"):
            if int(path.name.split("-")[1]) % self._shard.count == self._shard.index:
                path.unlink()

    def _marker(self, index: int) -> Path:
        return self.root / f"_done-{index:05}-of-{self._shard.count:05}"

    def _statistics(self, index: int) -> Path:
        return self.root / f"_summary-{index:05}-of-{self._shard.count:05}.json"

    def _all_done(self) -> bool:
        """Whether every shard has said that it is done and its rows still are there: a part may have been deleted."""
        if self._output.redo is not None:
            return True  # only a finished run can be redone
        done = done_rows(self._parts, self._parts.paths())
        for index in range(self._shard.count):
            try:
                said = json.loads(self._marker(index).read_text())
            except (OSError, ValueError):
                return False
            there = done.num_of_shard(index, self._shard.count)
            if said != self._state | {"rows": there}:
                return False
        return True

    @contextmanager
    def _finalizing(self) -> Iterator[None]:
        """What only one process may do at a time, whatever its shard."""
        with (self.root / "_lock-finalize").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def trace_path(root: Path, shard: ShardConfig) -> Path:
    """Where the trace of a shard goes."""
    part = f"-{shard.index:05}-of-{shard.count:05}" if shard.count > 1 else ""
    return root / f"_trace{part}.json"
