"""How workers share one output folder: a lease for each shard, renewed by heartbeats, and commits that a worker whose
lease was taken over cannot make.

A lease is a file `workers/<shard>-<generation>.json`: who holds it, since when, when it last gave a sign of life, and
under which names it commits. To take a shard is to *create* the file of its next generation, which only one of those who
try can do. The newest generation holds the shard. Nobody but its holder writes a lease, so nothing is compared and swapped.

Heartbeats only say who is probably dead. A worker that is stopped, swapped out or cut off from the network looks the
same as a dead one, and may wake up at any time, also between asking whether the lease is still its own and committing.
So no check before a commit can be enough, and none is relied upon. What is:

1. The parts of an index `i` are a log. Its holder commits `part-<i>-<n>` with n growing by one, and each commit is a
   `Storage.create`: the file appears whole if there was none of that name, or not at all.
2. Who takes over a lease first *seals* its log: it creates a part without rows under the next number. If that fails, the
   old holder has just committed that number; it is a commit like any other, and the next number is tried. When it
   succeeds, the old holder's next commit, whenever it comes, finds its name taken and is refused; and it will not try a
   later number, because it can only get there by committing this one.
3. The rows that are done are read *after* the seal. So every row that the old holder has committed, or ever will have, is
   known to the new one, which does the others. No row is there twice at any moment, for any reader: nothing has to be
   ignored, filtered or cleaned up.
4. Names are not used again: a new lease's numbers begin above all that there are, parts that are deleted in a merge leave
   higher numbers behind, and seals stay. So the name at which an old holder waits stays taken.
5. A holder publishes its first number in its lease, and then looks whether the lease is still the newest; who takes over
   creates its generation, and then reads that number. So if the number is not seen by the one, its end is by the other.

All that needs is `create`, which every POSIX file system has (link) and object stores have as a conditional PUT. The same
holds for what is not a shard: the lease `finalize` is held by whoever puts the whole in order, and its log is the journal
of the change to be made (`exchange`). Nobody waits for a seal where the old holder is known to be gone: a process of this
machine that is no more, on a store that does nothing late.

Whether a worker is alive: a process of this machine is looked up. Another one is, as long as its heartbeats come: who
wants to know watches their number (`beats`). When it has not grown for `shard.takeover_seconds` of the watcher's own clock
the worker counts as dead. Times that another machine has written are never compared with this machine's, so clocks need
not agree.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from batchmix.errors import BatchmixError
from batchmix.input.config import ShardConfig
from batchmix.output.owner import Owner
from batchmix.storage import Storage, create_json, read_json, write_json
from batchmix.storage.bookkeeping import WORKERS

FINALIZE = "finalize"
RUNNING, CLOSING, CLOSED = "running", "closing", "closed"
_PATIENCE = 0.5  # seconds between two looks at a heartbeat
_NAME = re.compile(rf"\d+-of-\d+|{FINALIZE}")

_first_seen: dict[tuple[str, str], tuple[int, float]] = {}  # by folder and lease: beats, time.monotonic()

_log = logging.getLogger(__name__)


def shard_name(index: int, count: int) -> str:
    """The name of a shard's lease."""
    return f"{index:05}-of-{count:05}"


@dataclass
class Record:
    """What a lease file says. Times are time.time() by the holder's clock, durations are seconds."""

    name: str  # of the shard, or FINALIZE
    generation: int
    owner: Owner
    state: str = RUNNING  # CLOSED: the holder will commit nothing any more; CLOSING: it took over only to make it so
    started: float = 0.0
    heartbeat: float = 0.0
    beats: int = 0
    heartbeat_seconds: float = 10.0
    takeover_seconds: float = 90.0
    indices: list[int] = field(default_factory=list)  # of the parts that it commits
    first_number: int | None = None  # of these parts; None: it has not got so far
    folder: str = ""  # where they go, `REDO/` for rows that are run again
    progress: dict[str, Any] = field(default_factory=dict)  # see `Progress`

    @property
    def path(self) -> str:
        return f"{WORKERS}/{self.name}-{self.generation:06}.json"

    def silence(self, storage: Storage) -> float:
        """Seconds without a heartbeat: of a process of this machine since the last one, of another since this process
        first saw the last one."""
        key = storage.url, self.path
        beats, since = _first_seen.get(key, (-1, 0.0))
        if beats != self.beats:
            since = time.monotonic()
            _first_seen[key] = self.beats, since
        return max(0.0, time.time() - self.heartbeat) if self.owner.here else time.monotonic() - since

    def lost(self, storage: Storage) -> bool:
        """Whether its holder may be succeeded: it has closed it, is gone, or was not heard of for too long."""
        return self.state == CLOSED or self.owner.gone or self.silence(storage) > self.takeover_seconds

    def needs_seal(self, storage: Storage) -> bool:
        """Whether a deed of its holder may still come, now that it has been taken over.

        Not where it has said goodbye, nor where it is known to have ended, but for workers of its own and late stores.
        """
        ended = self.owner.gone and len(self.indices) <= 1 and not storage.acts_late
        return self.state != CLOSED and not ended

    @staticmethod
    def load(storage: Storage, path: str) -> Record:
        """FileNotFoundError where it is gone; BatchmixError where it is no lease."""
        try:
            values = read_json(storage, path)
            record = Record(**{**values, "owner": Owner(**values["owner"])})
            _check_types(record)
            _check_types(record.owner)
            if record.path != path or not _NAME.fullmatch(record.name):
                raise ValueError(f"name is {record.name!r}, generation {record.generation}")
        except (ValueError, TypeError, KeyError) as error:
            raise BatchmixError(f"output.dir={storage.url}: {path} is not a lease of batchmix ({error}); if no worker runs, "
                                "delete it and run the command again") from None  # fmt: skip
        return record


_TYPES: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "list[int]": list, "int | None": (int, type(None)),
          "Owner": Owner, "dict[str, Any]": dict}  # fmt: skip


def _check_types(value: Record | Owner) -> None:
    """ValueError where a field holds what it cannot."""
    for item in dataclasses.fields(value):
        found = getattr(value, item.name)
        good = isinstance(found, _TYPES[str(item.type)]) and not isinstance(found, bool)
        good = good and (not isinstance(found, list) or all(type(index) is int for index in found))
        if not good or (isinstance(found, float) and not math.isfinite(found)):
            raise ValueError(f"{item.name} is {found!r}")


def read_leases(storage: Storage) -> dict[str, list[Record]]:
    """All leases by name, the generations of each in order; of most there is only one."""
    found: dict[str, list[Record]] = {}
    for path in storage.names(f"{WORKERS}/*.json"):
        try:
            record = Record.load(storage, path)
        except FileNotFoundError:  # a successor has just removed it
            continue
        found.setdefault(record.name, []).append(record)
    return {name: sorted(records, key=lambda record: record.generation) for name, records in found.items()}


class Busy(BatchmixError):
    """The lease is held by a process that is alive."""


class Lost(BatchmixError):
    """The lease is another's now: what this process has not committed, it may not commit any more."""


class Lease:
    """Held from the start to `close`. `predecessors`: of the same name, not known to have ended, to be sealed.

    Busy where another process holds it and is alive.
    """

    def __init__(self, storage: Storage, name: str, shard: ShardConfig, what: str, *, state: str = RUNNING) -> None:
        self._storage, self._what = storage, what
        self.progress: Callable[[], dict[str, Any]] = dict
        self.predecessors: list[Record] = []
        self._ended = threading.Event()
        self._lost_to: Record | None = None
        self._write_lock = threading.Lock()
        while True:
            known = read_leases(storage).get(name, [])
            if known and known[-1].state != CLOSED:
                wait_until_lost(storage, known[-1], what)
            now = time.time()
            self.record = Record(
                name, known[-1].generation + 1 if known else 1, Owner.this_process(), state, started=now, heartbeat=now,
                heartbeat_seconds=shard.heartbeat_seconds, takeover_seconds=shard.takeover_seconds,
            )  # fmt: skip
            if create_json(storage, self.record.path, dataclasses.asdict(self.record)):
                break
        self.predecessors = [record for record in read_leases(storage)[name] if record.generation < self.generation]
        self._thread = threading.Thread(target=self._run, name=f"lease {name}", daemon=True)
        self._thread.start()

    @property
    def generation(self) -> int:
        return self.record.generation

    def forget_predecessors(self) -> None:
        """They are sealed: their files go."""
        for record in self.predecessors:
            self._storage.delete(record.path)
        self.predecessors = []

    def publish(self, indices: list[int], first_number: int, folder: str) -> None:
        """Say under which names this holder will commit; Lost where it is too late for that."""
        self.record.indices, self.record.first_number, self.record.folder = indices, first_number, folder
        self._beat()
        self.check(look=True)

    def check(self, look: bool = False) -> None:
        """Lost where a heartbeat has found a newer generation; with `look`, asks now. A courtesy, see above."""
        if look:
            self._look()
        if self._lost_to is not None:
            raise lost(self._storage, self._what, self._lost_to)

    def close(self) -> None:
        """Say goodbye, once nothing more will be committed."""
        self._ended.set()
        self._thread.join()
        self._look()
        if self._lost_to is None and self.record.state != CLOSED:
            self.record.state = CLOSED
            self._beat()

    def _run(self) -> None:
        while not self._ended.wait(self.record.heartbeat_seconds):
            try:
                self._look()
                if self._lost_to is not None:
                    return
                self._beat()
            except Exception as error:  # stores have classes of their own, and may be back for the next heartbeat
                _log.warning("no heartbeat could be written for %s (%s)", self._what, error)

    def _look(self) -> None:
        newest = max(self._storage.names(f"{WORKERS}/{self.record.name}-*.json"), default=self.record.path)
        if newest > self.record.path:
            self._lost_to = Record.load(self._storage, newest)

    def _beat(self) -> None:
        with self._write_lock:
            self.record.beats += 1
            self.record.heartbeat = time.time()
            self.record.progress = self.progress()
            write_json(self._storage, self.record.path, dataclasses.asdict(self.record))


def lost(storage: Storage, what: str, successor: Record | None = None) -> Lost:
    """The error of a worker that comes too late."""
    by = f" by {successor.owner}" if successor else ""
    return Lost(f"output.dir={storage.url}: {what} was taken over{by} while this process gave no sign of life; "
                "what it had not committed by then is done there")  # fmt: skip


def wait_until_lost(storage: Storage, record: Record, what: str) -> None:
    """Return when the lease may be taken; Busy as soon as its holder is known to be alive, but for one that is CLOSING.

    A process of this machine is asked at once. Another one is watched for takeover_seconds: it may have been killed a
    moment ago, as a job is that its scheduler starts again on another machine.
    """
    waiting = False
    while not record.lost(storage):
        newest = _reload(storage, record)
        if newest is None or newest.state == CLOSED:
            return
        if (record.owner.here or newest.beats != record.beats) and newest.state != CLOSING:
            raise Busy(f"output.dir={storage.url}: another process ({record.owner}) is writing {what} there; "
                       "wait for it to end or choose another output.dir")  # fmt: skip
        record = newest
        if not waiting:
            waiting = True
            _log.info("%s is held by %s; waiting up to %.0f s for a sign of it", what, record.owner,
                      record.takeover_seconds - record.silence(storage))  # fmt: skip
        time.sleep(_PATIENCE)


def _reload(storage: Storage, record: Record) -> Record | None:
    try:
        return Record.load(storage, record.path)
    except FileNotFoundError:  # another has taken it, and swept up
        return None
