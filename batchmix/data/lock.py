"""Who may write into an output folder: one process for each shard, and all of them with the same shard.count."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from batchmix.config import ShardConfig
from batchmix.errors import BatchmixError

_PATIENCE = 10.0  # seconds


class FolderLock:
    """Held until `release` or the end of the process, however it ends (flock, so a killed process leaves none behind).

    `_lock` is shared by all writers and says their shard.count; `_lock-<index>` belongs to one of them.
    """

    def __init__(self, folder: Path, shard: ShardConfig) -> None:
        self._folder = folder
        self._index = shard.index
        self._common = _open(folder / "_lock")
        self._own = _open(folder / f"_lock-{shard.index:05}")
        self._count = str(shard.count)
        count = self._join()
        if count != self._count:
            raise self._refusal(f"a run with shard.count={count} is writing there")
        if not _try_lock(self._own, fcntl.LOCK_EX):
            who = _holder(self._own)
            raise self._refusal(f"another process{who} is writing shard {shard.index} of {shard.count} there")
        self._own.truncate(0)
        self._own.write(f"{os.uname().nodename} {os.getpid()}".encode())
        self._own.flush()

    def _join(self) -> str:
        """Share `_lock` and return the count that it says: ours, where nobody else is here.

        Who writes its count there holds the lock alone for a moment, and lets go of it before it shares it. So shards
        that start together find it taken, and try again.
        """
        deadline = time.monotonic() + _PATIENCE
        while True:
            if _try_lock(self._common, fcntl.LOCK_EX):
                self._common.seek(0)
                self._common.truncate(0)
                self._common.write(self._count.encode())
                self._common.flush()
            if _try_lock(self._common, fcntl.LOCK_SH):
                self._common.seek(0)
                return self._common.read().decode()
            if time.monotonic() > deadline:
                return "another"
            time.sleep(0.01)

    def _refusal(self, reason: str) -> BatchmixError:
        self.release()
        return BatchmixError(f"output.dir={self._folder}: {reason}; wait for it to end or choose another output.dir")

    @property
    def descriptors(self) -> tuple[int, int]:
        """Of the locked files; the locks hold for as long as any process has these open."""
        return self._common.fileno(), self._own.fileno()

    def alone(self) -> bool:
        """Whether no other shard is at work."""
        for path in self._folder.glob("_lock-[0-9]*"):
            if path.name == f"_lock-{self._index:05}":
                continue
            with _open(path) as file:
                if not _try_lock(file, fcntl.LOCK_SH):
                    return False
        return True

    def release(self) -> None:
        """Let the next writer in. The files stay: deleting them would let two writers each lock their own."""
        self._own.close()
        self._common.close()


def _open(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def _try_lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(file: IO[bytes]) -> str:
    node, _, pid = file.read().decode().partition(" ")
    return f" (process {pid} on {node})" if pid else ""
