"""Who may write into an output folder."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from batchmix.config import ShardConfig
from batchmix.data import lock
from batchmix.data.lock import FolderLock
from batchmix.errors import BatchmixError


def test_one_writer_for_each_shard_and_one_count(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path, ShardConfig(0, 2)), FolderLock(tmp_path, ShardConfig(1, 2))
    with pytest.raises(BatchmixError, match=r"another process .* is writing shard 1 of 2 there"):
        FolderLock(tmp_path, ShardConfig(1, 2))
    with pytest.raises(BatchmixError, match=r"a run with shard.count=2 is writing there"):
        FolderLock(tmp_path, ShardConfig(2, 3))
    first.release()
    second.release()
    FolderLock(tmp_path, ShardConfig(2, 3)).release()


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_shards_that_start_together_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    """Another shard takes `_lock` for itself just before this one asks for it, and shares it soon after."""
    try_lock: Callable[..., bool] = lock._try_lock
    other = lock._open(tmp_path / "_lock")
    timer = threading.Timer(0.2, lambda: fcntl.flock(other, fcntl.LOCK_SH))

    def meddle(file: object, wanted: int) -> bool:
        if wanted == kind and timer.ident is None:
            fcntl.flock(file, fcntl.LOCK_UN)  # type: ignore[call-overload]
            fcntl.flock(other, fcntl.LOCK_EX)
            other.truncate(0)
            other.write(b"2")
            other.flush()
            timer.start()
        return try_lock(file, wanted)

    monkeypatch.setattr(lock, "_try_lock", meddle)
    FolderLock(tmp_path, ShardConfig(0, 2)).release()
    other.close()
