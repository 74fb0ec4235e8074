"""`output.dir`: whose it is, what it holds already, and when it is complete."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from batchmix.errors import BatchmixError
from batchmix.input.config import ShardConfig
from batchmix.input.read_log import Extent
from batchmix.input.rowset import AllBut, RowSet
from batchmix.observability.summary import RunStatistics, Summary
from batchmix.output.config import OutputConfig
from batchmix.output.error_rows import too_many_errors
from batchmix.output.finalize import (
    Marker,
    close_lost,
    describe,
    finalize,
    finalizing,
    is_finished,
    missing_rows,
    open_leases,
    read_marker,
    read_markers,
    read_runs,
    settle,
    success,
)
from batchmix.output.lease import Busy, Lease, Record, shard_name, wait_until_lost
from batchmix.output.parts import PartLog, Parts
from batchmix.output.redo import replace_rows, rows_to_redo
from batchmix.output.run_info import accept_run, differences, read_run, record_redo
from batchmix.storage import read_json, reason_of, write_json
from batchmix.storage.bookkeeping import (
    CHECKSUMS,
    FAILED,
    FILES,
    FOLDERS,
    HYDRA,
    REDO,
    REDO_RUN,
    RUN,
    SUCCESS,
    WORKERS,
    done_name,
    statistics_name,
    trace_name,
)

_PARTS = ("part-*.arrow", "part-*.parquet", "part-*.jsonl")
_OURS = (*_PARTS, ".part-*.tmp", *FILES)

_log = logging.getLogger(__name__)


class OutputFolder:
    """One shard's hold on the output folder, from its lease to `finish`.

    `folder` is where this run's parts go: "", or `REDO/`. `skip` has the rows not to run; there is none where all is
    `complete`. BatchmixError where another process has
    this shard or the folder holds something else.
    """

    def __init__(self, output: OutputConfig, shard: ShardConfig, parts: Parts, run: dict[str, Any],
                 limit: int | None, max_error_share: float = 1.0) -> None:  # fmt: skip
        self.storage = parts.storage
        self.folder = "" if output.redo is None else f"{REDO}/"
        self._output, self._shard, self._parts, self._limit = output, shard, parts, limit
        self._max_error_share = max_error_share
        self._make()
        self._check_contents()
        what = f"shard {shard.index} of {shard.count}"
        self._lease = Lease(self.storage, shard_name(shard.index, shard.count), shard, what)
        try:
            if self.complete and not output.overwrite:  # nothing will be committed, so nobody needs to be kept from it
                accept_run(self.storage, run)
                return
            self._meet_others()
            settle(self.storage, shard)
            for record in self._lease.predecessors:
                self._check_overwrite(record)
                parts.seal(record)
            if output.overwrite and self.storage.exists(RUN):
                self._delete_ours()
            self._lease.forget_predecessors()
            self.first_number = parts.next_number()
            self._lease.publish([shard.index], self.first_number, self.folder)
            self.skip = self._open_redo(run) if output.redo else self._open(run)
        except BaseException:
            self._lease.close()
            raise

    def _open(self, run: dict[str, Any]) -> RowSet:
        if self._is_void(run):
            self._delete_ours()
        accept_run(self.storage, run)
        if self.storage.exists(REDO_RUN):
            raise BatchmixError(
                f"output.dir={self.storage.url}: rows are being redone there; finish that with output.redo, or delete"
                f" {self.storage.file_url(REDO)} to give it up"
            )
        self.storage.delete_unfinished("", self._is_mine)
        done = self._parts.rows(self._parts.names())
        self.num_done = done.num_of_shard(self._shard.index, self._shard.count)
        return done

    def _open_redo(self, run: dict[str, Any]) -> AllBut:
        redo, url = self._output.redo, self.storage.url
        assert redo is not None
        if self._shard.count > 1:
            raise BatchmixError(f"output.redo={redo.value} runs as one process; leave shard.count at 1")
        if not self.storage.exists(RUN) or not is_finished(self.storage):
            raise BatchmixError(
                f"output.redo={redo.value}: output.dir={url} holds no finished run; finish it first, without output.redo"
            )
        self._redo = {"redo": redo.value, "data.limit": self._limit} | {
            key: value for key, value in run["identity"].items() if key.startswith("sampling.")
        }
        done_before = read_run(self.storage)
        old = {key: value for key, value in done_before["identity"].items() if not key.startswith("sampling.")}
        new = {key: value for key, value in run["identity"].items() if not key.startswith("sampling.")}
        if differing := differences(old, new):
            raise BatchmixError(
                f"output.redo={redo.value}: only sampling.* may differ from the run in {url} ({'; '.join(differing)})"
            )
        wanted = RowSet()
        if self._redo not in done_before["redone"]:
            wanted = rows_to_redo(self._parts, redo)
            self.storage.make_folder(REDO)
            accept_run(self.storage, {**run, "identity": self._redo | new}, REDO_RUN)
            self.storage.delete_unfinished(self.folder, self._is_mine)
        if not len(wanted):
            _log.info("no row ended with %s that was not redone with these settings before", redo.value)
        redone = self._parts.rows(self._parts.names(self.folder))
        self.num_done = len(redone)
        return AllBut(wanted, redone)

    @property
    def complete(self) -> bool:
        """Whether SUCCESS is there, and by these settings nothing is left and not too many rows have an error."""
        if self._output.redo is not None:
            return False
        try:
            state = read_json(self.storage, SUCCESS)
        except (OSError, ValueError):
            return False
        expected = success(self._limit, self._output.order, self._parts)
        if not isinstance(state, dict) or any(state.get(key) != value for key, value in expected.items()):
            return False
        if missing_rows(self.storage, len(self._parts.rows(self._parts.names()))):
            return False  # a part was deleted, and an empty one taken in its place
        if "rows" not in state:  # of a release that took any number of errors
            return not too_many_errors(self._parts.totals(), self._max_error_share)
        return bool(state["error_rows"] <= self._max_error_share * state["rows"])

    def begin(self) -> None:
        """Rows will follow: what said that all is there goes. A redo replaces rows at its end, as one change."""
        if self._output.redo is not None:
            return
        self._lease.check(look=True)
        self._delete_state()
        self.storage.delete(done_name(self._shard.index, self._shard.count))

    def report(self, progress: Callable[[], dict[str, Any]]) -> None:
        """What heartbeats say of this shard's progress from now on."""
        self._lease.progress = progress

    def log(self, read: Callable[[], list[Extent]] = list) -> PartLog:
        """What commits this process's rows here; `read` tells what was newly read of the input."""
        return PartLog(self._parts, self.folder, self._shard.index, self.first_number, self._lease.check, read)

    def extents(self) -> list[Extent]:
        """What all who committed rows had read of the input."""
        rows = self._parts.names() or self._parts.names(f"{REDO}/")
        return self._parts.checksums.extents() if rows else []

    @property
    def trace_name(self) -> str:
        """Where this shard's trace goes."""
        return trace_name(self._shard.index, self._shard.count)

    def write_statistics(self, run: RunStatistics) -> None:
        """Keep what this run did for the summary of all shards."""
        write_json(self.storage, statistics_name(self._shard.index, self._shard.count), run.as_json())

    def finish(self, end: int) -> Summary | None:
        """All rows of this shard are committed. The last shard to get here puts the whole in order and sums it up.

        `end`: rows of the whole data set, up to data.limit.
        """
        self._lease.check(look=True)
        if self._output.redo is not None:
            if self._parts.names(self.folder) or self.storage.exists(REDO_RUN):
                with finalizing(self.storage, self._shard) as lease:
                    replace_rows(self._parts, lease.generation)
                record_redo(self.storage, self._redo)
            end = max((marker.end for marker in read_markers(self.storage).values()), default=0)
        else:
            done = self._parts.rows(self._parts.names())
            rows = done.num_of_shard(self._shard.index, self._shard.count)
            marker = Marker(self._limit, self._output.order, rows, end, self._max_error_share)
            marker.write(self.storage, self._shard.index, self._shard.count)
        self._lease.close()
        if not self._all_done():
            self._delete_state()
            return None
        with finalizing(self.storage, self._shard) as lease:
            if self.complete or not self._all_done() or not self._end_the_lost():
                return None
            return finalize(
                self._parts,
                lease,
                order=self._output.order,
                limit=self._limit,
                end=end,
                rows_per_shard=self._output.rows_per_shard,
                runs=read_runs(self.storage, self._shard.count),
                max_error_share=self._max_error_share,
            )

    def _delete_state(self) -> None:
        """All rows are not there, or may not be."""
        for name in (SUCCESS, FAILED):
            self.storage.delete(name)

    def close(self) -> None:
        """Let the next writer in."""
        self._lease.close()

    def _make(self) -> None:
        url = self.storage.url
        try:
            self.storage.make_folder(WORKERS)
            self.storage.make_folder(CHECKSUMS)
            exclusive = self.storage.exclusive
        except BatchmixError:
            raise
        except Exception as error:  # stores have classes of their own
            raise BatchmixError(f"output.dir={url}: cannot be written to ({reason_of(error)})") from None
        if exclusive:
            return
        if self._shard.count > 1:
            raise BatchmixError(f"output.dir={url}: this store has no conditional writes, which several workers need to "
                                "keep out of each other's way; run with shard.count=1 or choose another output.dir")  # fmt: skip
        _log.warning("%s has no conditional writes: two processes that write there at once would not notice", url)

    def _check_contents(self) -> None:
        has_run = self.storage.exists(RUN)
        strange = next((name for pattern in _PARTS for name in self.storage.names(pattern)), None)
        if strange is not None and not has_run:
            raise BatchmixError(
                f"output.dir={self.storage.url}: holds {strange} but no {RUN}, so it is not ours to write to;"
                " choose another output.dir"
            )
        if self._output.overwrite and has_run and self._shard.count > 1:
            raise BatchmixError(
                "output.overwrite=true: with shard.count above 1 each shard would delete the others' rows;"
                f" delete {self.storage.url} yourself or choose another output.dir"
            )

    def _meet_others(self) -> None:
        """Workers of a run with another shard.count have ended, or this one is refused."""
        for record in open_leases(self.storage):
            if not record.name.endswith(f"-of-{self._shard.count:05}"):
                wait_until_lost(self.storage, record, describe(record))
                self._check_overwrite(record)
                close_lost(self._parts, self._shard, record)

    def _check_overwrite(self, record: Record) -> None:
        """BatchmixError where a lost worker may only be silent: its seal would be deleted with all the rest."""
        silence = record.silence(self.storage)
        in_flight = record.owner.gone and silence <= record.takeover_seconds
        may_write = record.needs_seal(self.storage) and (not record.owner.gone or in_flight)
        if self._output.overwrite and record.first_number is not None and may_write:
            raise BatchmixError(
                f"output.overwrite=true: {record.owner} was not heard of for {silence:.0f} s and may still write to"
                f" output.dir={self.storage.url}; see that it has ended and delete {self.storage.file_url(record.path)}, or"
                " choose another output.dir"
            )

    def _delete_ours(self) -> None:
        for name in [name for pattern in _OURS for name in self.storage.names(pattern)]:
            self.storage.delete(name)
        for name in (HYDRA, *FOLDERS):
            self.storage.delete_folder(name)
        self.storage.make_folder(CHECKSUMS)

    def _is_void(self, run: dict[str, Any]) -> bool:
        """Whether a run with other settings left no rows here, as one does that is stopped while the model is loaded."""
        if not self.storage.exists(RUN) or any(self.storage.names(pattern) for pattern in _PARTS):
            return False
        return bool(differences(read_run(self.storage)["identity"], run["identity"])) and self._is_alone()

    def _is_mine(self, name: str) -> bool:
        """Whether a part is this shard's or its workers': others may be at work."""
        return int(name.split("-")[1]) % self._shard.count == self._shard.index

    def _is_alone(self) -> bool:
        """Whether no other shard is at work; those elsewhere are waited for until they give a sign or are lost."""
        mine = shard_name(self._shard.index, self._shard.count)
        try:
            for record in open_leases(self.storage):
                if record.name != mine:
                    wait_until_lost(self.storage, record, describe(record))
        except Busy:
            return False
        return True

    def _end_the_lost(self) -> bool:
        """Before the whole is put in order. False where a worker is alive: it will be the last to finish."""
        if not self._is_alone():
            return False
        for record in open_leases(self.storage):
            close_lost(self._parts, self._shard, record)
        return True

    def _all_done(self) -> bool:
        """Whether every shard has said that it is done and its rows still are there: a part may have been deleted."""
        if self._output.redo is not None:
            return True  # only a finished run can be redone
        markers = [read_marker(self.storage, index, self._shard.count) for index in range(self._shard.count)]
        if any(m is None or (m.limit, m.order) != (self._limit, self._output.order) for m in markers):
            return False
        done = self._parts.rows(self._parts.names())
        return all(
            marker is not None and marker.rows == done.num_of_shard(index, self._shard.count)
            for index, marker in enumerate(markers)
        )


def worker_trace_names(shard: ShardConfig, num_workers: int) -> list[str]:
    """Where the traces of a shard's `engine.data_parallel_size` workers go."""
    return [trace_name(shard.index + shard.count * place, shard.count * num_workers) for place in range(num_workers)]
