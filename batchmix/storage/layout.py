"""The two layouts of an output folder: that of `bookkeeping`, and that of releases before there was a `.batchmix/`.

Those kept `_run.json` for `.batchmix/run.json`, `_workers/` for `.batchmix/workers/` and so on, beside the parts. A folder
stays in the layout that it was begun in: nothing is moved, so nothing can be moved half, and all who open a folder, at any
time, agree on where its leases are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import pyarrow as pa

from batchmix.errors import BatchmixError
from batchmix.storage import Storage, Write, open_storage, reason_of
from batchmix.storage.bookkeeping import FOLDER, RUN, WORKERS


def open_output(url: str) -> Storage:
    """The store of an output.dir, by the names of `bookkeeping` in either layout; nothing is written yet.

    BatchmixError where it cannot be read, or has a run in each layout.
    """
    storage = open_storage(url)
    try:
        # A worker's lease is the first file of a run and run.json the second; one of the two is always there.
        if not storage.exists(old_name(RUN)) and not storage.names(old_name(f"{WORKERS}/*.json")):
            return storage
        if not storage.exists(RUN):
            return OldLayout(storage)
    except OSError as error:
        raise BatchmixError(f"output.dir={url}: cannot be read ({reason_of(error)})") from None
    raise BatchmixError(f"output.dir={storage.url}: an earlier release of batchmix has run there after this one, so the folder"
                        f" has both {RUN} and {old_name(RUN)}; choose another output.dir")  # fmt: skip


class OldLayout:
    """A store whose files below `.batchmix/` lie beside the parts, under names that begin with `_`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.url, self.acts_late, self.appends = storage.url, storage.acts_late, storage.appends

    @property
    def exclusive(self) -> bool:
        return self._storage.exclusive

    def file_url(self, name: str) -> str:
        return self._storage.file_url(old_name(name))

    def make_folder(self, name: str = "") -> None:
        self._storage.make_folder(old_name(name))

    def names(self, pattern: str) -> list[str]:
        found = self._storage.names(old_name(pattern))
        return found if old_name(pattern) == pattern else [f"{FOLDER}/{name.removeprefix('_')}" for name in found]

    def exists(self, name: str) -> bool:
        return self._storage.exists(old_name(name))

    def read(self, name: str) -> bytes:
        return self._storage.read(old_name(name))

    def open(self, name: str) -> IO[bytes]:
        return self._storage.open(old_name(name))

    def arrow_file(self, name: str) -> pa.NativeFile:
        return self._storage.arrow_file(old_name(name))

    def create(self, name: str, write: Write) -> bool:
        return self._storage.create(old_name(name), write)

    def replace(self, name: str, write: Write) -> None:
        self._storage.replace(old_name(name), write)

    def append(self, name: str, line: bytes) -> None:
        self._storage.append(old_name(name), line)

    def move(self, source: str, target: str) -> None:
        self._storage.move(old_name(source), old_name(target))

    def delete(self, name: str) -> None:
        self._storage.delete(old_name(name))

    def delete_folder(self, name: str) -> None:
        self._storage.delete_folder(old_name(name))

    def sync(self) -> None:
        self._storage.sync()

    def local_file(self, name: str) -> AbstractContextManager[Path]:
        return self._storage.local_file(old_name(name))

    def delete_unfinished(self, folder: str, belongs: Callable[[str], bool]) -> None:
        self._storage.delete_unfinished(old_name(folder), belongs)


def old_name(name: str) -> str:
    """What the old layout calls it; parts and Hydra's files have the same name in both."""
    return f"_{name.removeprefix(f'{FOLDER}/')}" if name.startswith(f"{FOLDER}/") else name
