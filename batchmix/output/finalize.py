"""The end of a run: who may put the whole in order, and what that is."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from batchmix.errors import BatchmixError
from batchmix.input.config import ShardConfig
from batchmix.observability.error_reasons import ErrorReasons
from batchmix.observability.summary import Summary
from batchmix.observability.totals import Totals
from batchmix.output.config import Order
from batchmix.output.error_rows import TooManyErrors, explain_errors, too_many_errors
from batchmix.output.exchange import finish_exchange, unfinished_exchange
from batchmix.output.lease import CLOSED, CLOSING, FINALIZE, Busy, Lease, Record, read_leases, wait_until_lost
from batchmix.output.merge import check_once, merge_in_order
from batchmix.output.parts import Parts
from batchmix.storage import Storage, read_json, reason_of, write_json
from batchmix.storage.bookkeeping import DONE, FAILED, MERGE, REDO, SUCCESS, SUMMARY, done_name, statistics_name

_MARKER = re.compile(rf"{re.escape(DONE)}-(\d+)-of-(\d+)$")
_PATIENCE = 0.5  # seconds between two tries to be the one who finalizes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Marker:
    """`done-<index>-of-<count>`: what a shard said when all its rows were committed."""

    limit: int | None
    order: Order
    rows: int  # of the shard, that were there
    end: int  # rows of the whole data set, up to the limit
    max_error_share: float = 1.0

    def write(self, storage: Storage, index: int, count: int) -> None:
        value = {"limit": self.limit, "order": self.order.value, "rows": self.rows, "end": self.end,
                 "max_error_share": self.max_error_share}  # fmt: skip
        write_json(storage, done_name(index, count), value)


def read_marker(storage: Storage, index: int, count: int) -> Marker | None:
    try:
        said = read_json(storage, done_name(index, count))
        share = float(said.get("max_error_share", 1.0))  # of releases before there was one
        return Marker(said["limit"], Order(said["order"]), int(said["rows"]), int(said["end"]), share)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_markers(storage: Storage) -> dict[tuple[int, int], Marker]:
    """By (index, count), also of runs with another shard.count."""
    found = {}
    for name in storage.names(f"{DONE}-*"):
        if match := _MARKER.match(name):
            place = int(match[1]), int(match[2])
            if (marker := read_marker(storage, *place)) is not None:
                found[place] = marker
    return found


@contextmanager
def finalizing(storage: Storage, shard: ShardConfig) -> Iterator[Lease]:
    """What only one process may do at a time, whatever its shard; waits for its turn. Unfinished exchanges are finished."""
    waiting = False
    while True:
        try:
            lease = Lease(storage, FINALIZE, shard, "the whole")
            break
        except Busy as error:
            if not waiting:
                _log.info("waiting: %s", error)
            waiting = True
            time.sleep(_PATIENCE)
    try:
        finish_exchange(storage, lease)
        for name in storage.names(f"{MERGE}-*"):
            storage.delete_folder(name)
        yield lease
    finally:
        lease.close()


def settle(storage: Storage, shard: ShardConfig) -> None:
    """Wait for whoever finalizes now, or finish what one has left undone."""
    records = read_leases(storage).get(FINALIZE)
    if (records and records[-1].state != CLOSED) or unfinished_exchange(storage):
        with finalizing(storage, shard):
            pass


def close_lost(parts: Parts, shard: ShardConfig, record: Record) -> None:
    """Take over a lease only to end it: its holder will commit nothing from here on. Busy where it is alive."""
    storage, what = parts.storage, describe(record)
    wait_until_lost(storage, record, what)
    lease = Lease(storage, record.name, shard, what, state=CLOSING)
    try:
        for predecessor in lease.predecessors:
            parts.seal(predecessor)
        lease.forget_predecessors()
    finally:
        lease.close()


def open_leases(storage: Storage) -> list[Record]:
    """The newest of each shard's leases, where its holder has not said goodbye."""
    newest = [records[-1] for name, records in read_leases(storage).items() if name != FINALIZE]
    return [record for record in newest if record.state != CLOSED]


def describe(record: Record) -> str:
    """`shard 3 of 8`"""
    index, _, count = record.name.partition("-of-")
    return f"shard {int(index)} of {int(count)}" if count else "the whole"


def finalize(
    parts: Parts, lease: Lease, *, order: Order, limit: int | None, end: int, rows_per_shard: int, runs: list[Any],
    max_error_share: float,
) -> Summary:  # fmt: skip
    """Check, order, sum up and say that it is complete, or finished with too many errors. The caller holds `lease`, FINALIZE,
    and no worker is left."""
    try:
        check_once(parts, end)
    except BatchmixError:
        parts.storage.delete(SUCCESS)  # where parts were deleted since
        raise
    if order is Order.input:
        merge_in_order(parts, rows_per_shard, lease.generation)
    totals = parts.totals()
    reasons = parts.error_reasons() if totals.error_rows else ErrorReasons()
    summary = Summary(totals, runs, reasons)
    lease.check(look=True)
    parts.checksums.sweep(parts.names() + parts.names(f"{REDO}/"))
    summary.write(parts.storage, SUMMARY)
    state = success(limit, order, parts) | {"rows": totals.rows, "error_rows": totals.error_rows}
    failed = too_many_errors(totals, max_error_share)
    if failed:
        state["error"] = explain_errors(parts.storage.url, totals, reasons, max_error_share)
    parts.storage.delete(SUCCESS if failed else FAILED)
    write_json(parts.storage, FAILED if failed else SUCCESS, state)
    return summary


def check_errors(storage: Storage) -> None:
    """TooManyErrors where the run there was finished with too many."""
    if (failure := read_failure(storage)) is not None:
        raise TooManyErrors(failure)


def read_failure(storage: Storage) -> str | None:
    """What `FAILED` says; None where there is none."""
    if not storage.exists(FAILED):
        return None
    try:
        return str(read_json(storage, FAILED)["error"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{storage.file_url(FAILED)}: cannot be read ({reason_of(error)}); run the command again"


def is_finished(storage: Storage) -> bool:
    """Whether all rows of a run are there, whatever became of them."""
    return storage.exists(SUCCESS) or storage.exists(FAILED)


def missing_rows(storage: Storage, done: int) -> int | None:
    """Of a run that has `SUCCESS`: how many of its rows are not among the `done` ones, as parts were deleted since. None where
    there is no such file, or a damaged one."""
    try:
        state = read_json(storage, SUCCESS)
        return max(0, int(state.get("rows", 0)) - done)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def success(limit: int | None, order: Order, parts: Parts) -> dict[str, Any]:
    """What `SUCCESS` says."""
    return {"limit": limit, "order": order.value, "parts": len(parts.names())}


def read_runs(storage: Storage, count: int) -> list[Any]:
    """What the last runs of the shards did. A damaged file is left out with a line: no row depends on it."""
    found = []
    for name in (statistics_name(index, count) for index in range(count)):
        try:
            run = read_json(storage, name)
            Summary(Totals(), [run]).as_json()
            found.append(run)
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("%s is damaged (%s): the summary lacks that shard's times", storage.file_url(name), error)
    return found
