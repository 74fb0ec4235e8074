"""Who may write into an output folder, and what becomes of those who may no longer."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from batchmix.errors import BatchmixError
from batchmix.input.config import ShardConfig
from batchmix.output import lease as leases
from batchmix.output.columns import OutputColumns
from batchmix.output.config import OutputFormat
from batchmix.output.lease import (
    CLOSED,
    CLOSING,
    Busy,
    Lease,
    Lost,
    Record,
    read_leases,
    shard_name,
    wait_until_lost,
)
from batchmix.output.owner import Owner
from batchmix.output.part_formats import part_format
from batchmix.output.parts import PartLog, Parts
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig
from batchmix.storage import LocalFolder, Storage, write_json
from batchmix.storage.bookkeeping import CHECKSUMS, WORKERS
from batchmix.storage.layout import OldLayout
from batchmix.storage.object_store import ObjectStore

SHARD = ShardConfig(1, 4)
NAME = shard_name(1, 4)


@pytest.fixture(params=["folder", "old layout", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    store: Storage = ObjectStore(f"memory://{tmp_path}") if request.param == "object store" else LocalFolder(tmp_path)
    if request.param == "old layout":
        store = OldLayout(store)
    for folder in (WORKERS, CHECKSUMS):
        store.make_folder(folder)
    return store


def parts_of(storage: Storage, form: OutputFormat = OutputFormat.arrow) -> Parts:
    columns = OutputColumns(pa.schema([]), token_ids=False, logprobs=False)
    return Parts(storage, part_format(form, columns, None, None))


def take(storage: Storage, **options: float) -> Lease:
    return Lease(storage, NAME, dataclasses.replace(SHARD, **options), "shard 1 of 4")


def failed(row: int) -> Completion:
    return Completion.failed(Prompt(row, str(row), {}, [], SamplingConfig()), "no")


def elsewhere(storage: Storage, lease: Lease, **changes: object) -> Record:
    """The lease as if a process of another machine held it."""
    owner = Owner("another", 7, 0.0, "another boot")
    record = dataclasses.replace(lease.record, owner=owner, **changes)  # type: ignore[arg-type]
    write_json(storage, record.path, dataclasses.asdict(record))
    return record


def test_one_holder(storage: Storage) -> None:
    first = take(storage)
    with pytest.raises(Busy, match=rf"\(process {os.getpid()} on .*\) is writing shard 1 of 4 there"):
        take(storage)
    Lease(storage, shard_name(2, 4), SHARD, "shard 2 of 4").close()
    first.close()
    second = take(storage)
    assert second.generation == 2
    assert [record.state for record in second.predecessors] == [CLOSED]
    second.close()


def test_of_many_that_try_at_once_one_succeeds(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other creates its lease when this one has looked and seen none."""
    others: list[Lease] = []
    create = leases.create_json

    def slower(*args: object) -> bool:
        if not others:
            others.append(None)  # type: ignore[arg-type]
            others[0] = take(storage)
        return create(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(leases, "create_json", slower)
    with pytest.raises(Busy):
        take(storage)
    others[0].close()


def test_a_process_that_is_no_more_is_succeeded_at_once(storage: Storage) -> None:
    process = subprocess.Popen(["sleep", "100"])
    here = Owner.this_process()
    child = dataclasses.replace(here, pid=process.pid, started=time.time())
    record = dataclasses.replace(Record(NAME, 1, child), heartbeat=time.time())
    write_json(storage, record.path, dataclasses.asdict(record))
    with pytest.raises(Busy):
        take(storage)
    process.kill()
    while not child.gone:  # before it is waited for, too
        time.sleep(0.01)
    process.wait()
    assert child.gone
    take(storage).close()
    assert dataclasses.replace(here, started=here.started - 60).gone, "another process of the same number"


@pytest.mark.parametrize("ahead", [-1e6, 0.0, 86400.0, 1e9], ids="clock {} s ahead".format)
def test_a_process_elsewhere_is_waited_for_by_the_own_clock(storage: Storage, ahead: float) -> None:
    first = take(storage)
    first.close()
    record = elsewhere(storage, first, state="running", heartbeat=time.time() + ahead, takeover_seconds=1.0)
    started = time.monotonic()
    wait_until_lost(storage, record, "shard 1 of 4")
    assert 1.0 < time.monotonic() - started < 10
    second = take(storage)  # not waited for again
    assert time.monotonic() - started < 10
    assert second.generation == 2
    second.close()


def test_heartbeats_with_a_clock_that_stands_are_signs_of_life(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder that is CLOSING and lives is waited for, as long as it beats."""
    first = take(storage)
    first.close()
    record = elsewhere(storage, first, state=CLOSING, heartbeat=0.0, takeover_seconds=0.3)
    beats = iter(range(record.beats + 1, record.beats + 6))
    now = 100.0  # of a clock that no other load of the machine delays

    def beat(_: float) -> None:
        nonlocal now
        now += 0.2
        if (number := next(beats, None)) is not None:
            elsewhere(storage, first, state=CLOSING, heartbeat=0.0, takeover_seconds=0.3, beats=number)

    monkeypatch.setattr(time, "sleep", beat)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    wait_until_lost(storage, record, "shard 1 of 4")
    assert 101.2 < now < 101.7


def test_a_process_elsewhere_that_lives_is_not_succeeded(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    first = take(storage)
    first.close()
    record = elsewhere(storage, first, state="running", heartbeat=time.time())
    monkeypatch.setattr(time, "sleep", lambda _: elsewhere(storage, first, state="running", beats=record.beats + 1))
    with pytest.raises(Busy, match="process 7 on another"):
        take(storage)


@pytest.mark.parametrize("form", list(OutputFormat))
@pytest.mark.parametrize("committed", [0, 2])
def test_late_commits_are_refused(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, form: OutputFormat, committed: int
) -> None:
    """The old holder is stopped wherever it hurts most: just before its part appears."""
    parts = parts_of(storage, form)
    first = take(storage)
    first.publish([1, 5], parts.next_number(), "")
    logs = [PartLog(parts, "", index, 0, first.check) for index in (1, 5)]
    for row in range(committed):
        logs[0].commit([failed(row)])
    elsewhere(storage, first, takeover_seconds=0.1)
    second = take(storage)
    logs[0].commit([failed(10)])  # between the new holder's lease and its seal
    for record in second.predecessors:
        parts.seal(record)
    second.forget_predecessors()
    done = [*range(committed), 10]
    assert list(parts.rows(parts.names())) == done
    for log in logs:
        for _ in range(2):
            with pytest.raises(Lost, match="was taken over"):
                log.commit([failed(11)])
    number = parts.next_number()
    second.publish([1], number, "")
    PartLog(parts, "", 1, number, second.check).commit([failed(11)])
    with pytest.raises(Lost):
        logs[0].commit([failed(11)])
    with pytest.raises(Lost, match=r"shard 1 of 4 was taken over by process \d+ on"):
        first.check(look=True)
    assert list(parts.rows(parts.names())) == [*done, 11]
    assert sum(len(parts.keys(name)) for name in parts.names()) == committed + 2
    first.close()  # says nothing: the lease is another's
    assert [record.generation for record in read_leases(storage)[NAME]] == [2]
    second.close()


def test_a_holder_that_was_succeeded_before_it_had_published_ends_there(storage: Storage) -> None:
    first = take(storage)
    elsewhere(storage, first, takeover_seconds=0.1)
    second = take(storage)
    with pytest.raises(Lost):
        first.publish([1], 0, "")
    second.close()


def test_heartbeats(storage: Storage) -> None:
    lease = take(storage, heartbeat_seconds=0.05)
    lease.progress = lambda: {"rows": 5}
    deadline = time.monotonic() + 20
    while (record := Record.load(storage, lease.record.path)).beats < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert record.progress == {"rows": 5}
    assert not record.lost(storage)
    newer = dataclasses.replace(record, generation=2)
    write_json(storage, newer.path, dataclasses.asdict(newer))
    while lease._thread.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(Lost):
        lease.check()
    lease.close()


def test_heartbeats_go_on_when_the_store_was_away(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = take(storage, heartbeat_seconds=0.02)
    write, failures = leases.write_json, iter([ConnectionError("away"), RuntimeError("a class of the store's own")])

    def unsure(*args: object) -> None:
        if (error := next(failures, None)) is not None:
            raise error
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(leases, "write_json", unsure)
    deadline = time.monotonic() + 20
    while Record.load(storage, lease.record.path).beats < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lease.close()


DAMAGED = {
    "cut off": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: "\x00" + text,
    "deep": lambda text: "[" * 100_000,
    "a list": lambda text: f"[{text}]",
    "no owner": lambda text: text.replace('"owner"', '"own"'),
    "a word for a number": lambda text: (
        text.replace('"beats": ', '"beats": "x').replace("x0", 'x0"').replace("x1", 'x1"')
    ),
    "NaN": lambda text: text.replace('"takeover_seconds": 90.0', '"takeover_seconds": NaN'),
    "another's": lambda text: text.replace('"generation": 1', '"generation": 3'),
    "indices of text": lambda text: text.replace('"indices": []', '"indices": ["../x"]'),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_lease_is_named(storage: Storage, damage: Callable[[str], str]) -> None:
    first = take(storage)
    first.close()
    text = storage.read(first.record.path).decode()
    assert damage(text) != text
    storage.replace(first.record.path, lambda file: file.write(damage(text).encode()))
    with pytest.raises(BatchmixError, match=rf"{first.record.path} is not a lease of batchmix \(.*\); .* delete it"):
        take(storage)
