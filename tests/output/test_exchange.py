"""Changes to a folder that a crash cannot leave half done."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from batchmix.input.config import ShardConfig
from batchmix.output.exchange import exchange, finish_exchange
from batchmix.output.lease import FINALIZE, Lease, Lost
from batchmix.storage import LocalFolder
from batchmix.storage.bookkeeping import FOLDER, MERGE, WORKERS


class Crash(BaseException):
    """The end of the process, which no `except Exception` sees."""


def finalizer(storage: LocalFolder) -> Lease:
    storage.make_folder(WORKERS)
    return Lease(storage, FINALIZE, ShardConfig(), "the whole")


@pytest.mark.parametrize("steps", range(20))
def test_an_exchange_that_crashes_is_whole_once_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    storage = LocalFolder(tmp_path)
    storage.make_folder(MERGE)
    for name in ("old1", "old2", "kept", f"{MERGE}/new1", f"{MERGE}/new2"):
        (tmp_path / name).write_text(name)
    left = steps

    def crashing(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return function(*args, **options)

        return call

    first = finalizer(storage)
    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "link"), (os, "fsync"), (shutil, "rmtree")):
            patch.setattr(owner, name, crashing(getattr(owner, name)))
        with contextlib.suppress(Crash):
            exchange(storage, first.generation, MERGE, [f"{MERGE}/new1", f"{MERGE}/new2"], ["old1", "old2"])
    first.close()
    second = finalizer(storage)
    finish_exchange(storage, second)
    second.close()
    there = {path.name for path in tmp_path.iterdir() if path.name != FOLDER}
    assert there == ({"old1", "old2", "kept"} if "old1" in there else {"new1", "new2", "kept"})
    assert (tmp_path / MERGE).exists() == ("old1" in there)


def test_an_exchange_by_one_who_wakes_up_late_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalFolder(tmp_path)
    (tmp_path / "old").write_text("old")
    storage.make_folder(MERGE)
    (tmp_path / MERGE / "new").write_text("new")
    first = finalizer(storage)
    with monkeypatch.context() as patch:
        patch.setattr("batchmix.output.lease.Record.lost", lambda *_: True)  # no sign of life
        second = finalizer(storage)
    finish_exchange(storage, second)
    with pytest.raises(Lost, match="the whole was taken over"):
        exchange(storage, first.generation, MERGE, [f"{MERGE}/new"], ["old"])
    assert (tmp_path / "old").exists()
    assert not (tmp_path / "new").exists()
    second.close()
    first.close()


@pytest.mark.parametrize("moment", ["before", "while it is written", "once it is there"])
def test_a_file_in_a_folder_that_somebody_swept_up_is_not_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    storage = LocalFolder(tmp_path)
    storage.make_folder(MERGE)

    def swept_up(*_: Any) -> None:
        storage.delete_folder(MERGE)

    if moment == "before":
        swept_up()
    if moment == "once it is there":
        monkeypatch.setattr(os, "link", swept_up)
    write = swept_up if moment == "while it is written" else lambda file: file.write(b"text")
    assert not storage.create(f"{MERGE}/part", write)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError):
        storage.create(f"{MERGE}/part", write)
