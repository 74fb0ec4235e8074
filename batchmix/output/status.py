"""`batchmix status`: how far a run is, by shard, and which workers are alive."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pyarrow.compute as pc

from batchmix.input.rowset import RowSet
from batchmix.observability.error_reasons import ErrorReason, reason_lines
from batchmix.observability.progress import duration
from batchmix.output.finalize import missing_rows, read_failure, read_markers
from batchmix.output.lease import CLOSED, FINALIZE, Record, read_leases
from batchmix.output.parts import Parts
from batchmix.storage import Storage

COMPLETE, RUNNING, ATTENTION = 0, 3, 4  # exit codes of `batchmix status`
_MISSED_BEATS = 3  # after so many a worker is called stuck; it can be taken over later, after shard.takeover_seconds
_PATIENCE = 0.5  # seconds between two looks at the heartbeats of other machines
_LOOKED_INTO = 64  # parts, for the reasons of errors
_HEAD = f"{'shard':>7} {'done':>11} {'failed':>8} {'left':>11} {'rows/s':>7}  worker"


@dataclass(frozen=True)
class ShardStatus:
    """One shard. `left` is None where nobody has read the data to its end yet."""

    index: int
    count: int
    done: int
    failed: int
    left: int | None
    lease: Record | None
    silence: float = 0.0  # seconds without a heartbeat, see Record.silence

    @property
    def alive(self) -> bool:
        """Whether a worker is at it, and was heard of lately."""
        return self.lease is not None and self.lease.state != CLOSED and not self.lease.owner.gone and not self.stuck

    @property
    def stuck(self) -> bool:
        """Whether its worker has not said goodbye, but no sign of life for some time either."""
        lease = self.lease
        if lease is None or lease.state == CLOSED or lease.owner.gone:
            return False
        return self.silence > _MISSED_BEATS * lease.heartbeat_seconds

    @property
    def rate(self) -> float:
        """Rows a second since its worker was started; 0 where none is alive."""
        if self.lease is None or not self.alive:
            return 0.0
        return float(self.lease.progress.get("rows", 0) / max(self.lease.heartbeat - self.lease.started, 1.0))

    def line(self) -> str:
        """Of the table."""
        left = "?" if self.left is None else f"{self.left:,}"
        rate = f"{self.rate:,.1f}" if self.alive else "-"
        shard = f"{self.index}/{self.count}"
        return f"{shard:>7} {self.done:>11,} {self.failed:>8,} {left:>11} {rate:>7}  {self._worker()}"[:80].rstrip()

    def _worker(self) -> str:
        lease = self.lease
        if lease is None:
            return "not started"
        if self.stuck:
            return f"stuck: no heartbeat for {self.silence:.0f} s"
        if self.alive:
            return f"alive, {lease.owner.pid} on {lease.owner.host}"
        if self.left == 0:
            return "done"
        return "ended" if lease.state == CLOSED else "killed"


@dataclass(frozen=True)
class Status:
    """A run, as its folder shows it."""

    url: str
    complete: bool
    shards: list[ShardStatus]
    finalizer: Record | None  # who puts the whole in order now
    failure: str | None = None  # why a run whose rows are all there is no success
    reasons: tuple[ErrorReason, ...] = ()  # why rows failed, the most common first
    missing: int = 0  # rows that a finished run had

    @staticmethod
    def read(parts: Parts) -> Status:
        """From the leases, the parts and what finished shards have said.

        Workers of other machines are watched until each has given a sign, or missed three heartbeats.
        """
        storage = parts.storage
        leases = _watch(storage)
        finalizer = leases.pop(FINALIZE, None)
        done, failed = RowSet(), RowSet()
        for keys in parts.all_keys(parts.names()):
            done.add_many(keys.row)
            failed.add_many(keys.row[pc.equal(keys.finish_reason, "error").to_numpy(zero_copy_only=False)])
        said = [record.progress.get("num_rows") for record in leases.values()]
        ends = [marker.end for marker in read_markers(storage).values()] + [rows for rows in said if rows is not None]
        end = max(ends, default=None)
        # Of runs with other counts: whose numbers of parts are the highest. Their clocks may differ.
        newest = max(
            leases.values(), key=lambda record: (record.state != CLOSED, record.first_number or 0), default=None
        )
        count = int(newest.name.partition("-of-")[2]) if newest else 1
        shards = []
        for index in range(count):
            rows = done.num_of_shard(index, count)
            left = None if end is None else max(0, len(range(index, end, count)) - rows)
            lease = leases.get(f"{index:05}-of-{count:05}")
            silence = 0.0 if lease is None else lease.silence(storage)
            shards.append(ShardStatus(index, count, rows, failed.num_of_shard(index, count), left, lease, silence))
        busy = finalizer if finalizer is not None and not _lost(storage, finalizer) else None
        reasons = tuple(parts.error_reasons(_LOOKED_INTO).most_common()) if len(failed) else ()
        missing = missing_rows(storage, len(done))
        return Status(storage.url, missing == 0, shards, busy, read_failure(storage), reasons, missing or 0)

    @property
    def exit_code(self) -> int:
        """COMPLETE; RUNNING where workers see to all that is left; ATTENTION where a person or a scheduler has to."""
        if self.complete:
            return COMPLETE
        if self.finalizer is not None:
            return RUNNING
        if self.failure is not None:
            return ATTENTION
        at_work = any(shard.alive for shard in self.shards)  # the last of them finalizes
        seen_to = all(shard.alive or shard.left == 0 for shard in self.shards)
        stuck = any(shard.stuck for shard in self.shards)
        return RUNNING if at_work and seen_to and not stuck else ATTENTION

    def text(self) -> str:
        """A table of at most 80 columns, and lines."""
        done, failed = (sum(getattr(shard, key) for shard in self.shards) for key in ("done", "failed"))
        lefts = [shard.left for shard in self.shards]
        left = None if None in lefts else sum(rows or 0 for rows in lefts)
        rate = sum(shard.rate for shard in self.shards)
        total = f"{'all':>7} {done:>11,} {failed:>8,} {'?' if left is None else f'{left:,}':>11} {rate:>7,.1f}"
        lines = [_HEAD, *(shard.line() for shard in self.shards), total]
        if left is None:
            lines.append("left: not known until a worker has read the data to its end")
        if self.reasons:
            lines += [
                "failed rows by reason, with an example:",
                *reason_lines([*self.reasons], 5),
            ]
        return "\n".join([*lines, self._verdict(left, rate)])

    def _verdict(self, left: int | None, rate: float) -> str:
        if self.complete:
            return "complete: every row is there"
        if self.missing:
            return f"{self.missing:,} rows of the finished run are not in its parts any more: run the generate command again"
        if self.failure is not None:
            return f"finished with too many errors: {self.failure}"
        if self.finalizer is not None:
            return f"{self.finalizer.owner} checks the rows and puts them in order"
        alive = sum(shard.alive for shard in self.shards)
        stuck = sum(shard.stuck for shard in self.shards)
        waiting = sum(not shard.alive and not shard.stuck and shard.left != 0 for shard in self.shards)
        parts = [f"{alive} of {len(self.shards)} workers alive", f"{stuck} stuck" * bool(stuck)]
        parts.append(f"{waiting} shards wait for a worker" * bool(waiting))
        if left == 0 and not alive:
            parts.append("all rows are done: run batchmix finalize")
        elif left is not None and rate > 0:
            parts.append(f"ETA {duration(left / rate)}")
        return ", ".join(filter(None, parts))


def _watch(storage: Storage) -> dict[str, Record]:
    """The newest leases by name, once it is known of each whether its holder gives signs of life."""
    first = {name: records[-1] for name, records in read_leases(storage).items()}
    while True:
        leases = {name: records[-1] for name, records in read_leases(storage).items()}
        unknown = [
            lease
            for name, lease in leases.items()
            if lease.state != CLOSED and not lease.owner.here and name in first
            and (lease.generation, lease.beats) == (first[name].generation, first[name].beats)
            and lease.silence(storage) <= _MISSED_BEATS * lease.heartbeat_seconds
        ]  # fmt: skip
        if not unknown:
            return leases
        time.sleep(_PATIENCE)


def _lost(storage: Storage, lease: Record) -> bool:
    return lease.lost(storage) or lease.silence(storage) > _MISSED_BEATS * lease.heartbeat_seconds
