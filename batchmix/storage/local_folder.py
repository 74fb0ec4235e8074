"""A folder as a store."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import IO

import pyarrow as pa

from batchmix.errors import BatchmixError
from batchmix.redact import redact
from batchmix.storage.base import Write, matches

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class LocalFolder:
    """A folder, of this machine or mounted from another. Its file system must have hard links."""

    acts_late = False
    appends = True
    exclusive = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = redact(str(root))

    def file_url(self, name: str) -> str:
        return f"{self.url}/{name}"

    def path(self, name: str) -> Path:
        return self.root / name

    def make_folder(self, name: str = "") -> None:
        self.path(name).mkdir(parents=True, exist_ok=True)

    def names(self, pattern: str) -> list[str]:
        folder, _, last = pattern.rpartition("/")
        prefix = f"{folder}/" if folder else ""
        try:
            entries = os.listdir(self.root / folder)
        except FileNotFoundError:
            return []
        return sorted(prefix + name for name in entries if matches(name, last))

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        return self.path(name).open("rb")

    def arrow_file(self, name: str) -> pa.NativeFile:
        return pa.memory_map(str(self.path(name)))

    def create(self, name: str, write: Write) -> bool:
        temporary, path = self._temporary(name), self.path(name)
        try:
            self._write(temporary, write)
            try:
                os.link(temporary, path)
            except FileExistsError:
                # A network file system may have asked its server twice: the first time it was done.
                return os.path.samestat(temporary.stat(), path.stat())
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise BatchmixError(f"output.dir={self.url}: this file system has no hard links, which commits need; "
                                    "choose another output.dir") from None  # fmt: skip
            sync_folder(path.parent)
            return True
        except FileNotFoundError:
            if not self.root.is_dir():
                raise
            return False  # whoever took over has swept up, which may take a folder in ours, too
        finally:
            with suppress(OSError):
                temporary.unlink()

    def replace(self, name: str, write: Write) -> None:
        temporary, path = self._temporary(name), self.path(name)
        try:
            self._write(temporary, write)
            temporary.rename(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)

    def append(self, name: str, line: bytes) -> None:
        with self.path(name).open("ab", buffering=0) as file:  # one write: several shards may append to the same file
            file.write(line)

    def move(self, source: str, target: str) -> None:
        with suppress(FileNotFoundError):
            self.path(source).rename(self.path(target))

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def delete_folder(self, name: str) -> None:
        shutil.rmtree(self.path(name), ignore_errors=True)

    def sync(self) -> None:
        sync_folder(self.root)

    def local_file(self, name: str) -> AbstractContextManager[Path]:
        return nullcontext(self.path(name))

    def delete_unfinished(self, folder: str, belongs: Callable[[str], bool]) -> None:
        for name in self.names(f"{folder}.part-*.tmp"):
            if belongs(name.removeprefix(f"{folder}.")):
                self.delete(name)

    def _temporary(self, name: str) -> Path:
        # Of this writer alone: two that try the same name must not write into one file.
        path = self.path(name)
        return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")

    def _write(self, path: Path, write: Write) -> None:
        with path.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
