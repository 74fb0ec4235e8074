"""Where output files are kept: a folder of this machine or of a shared file system, or a place in an object store.

All that the output needs of a store is here; what people are handed (reviews, exports) is written through it too. The
one promise everything else rests on is `create`: a file appears under its name whole, at once, and only where none of that
name was; of two that try, one is told that it came too late. Names are relative to the output folder, with `/` between
folder and file.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa

from batchmix.errors import BatchmixError
from batchmix.redact import redact

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)

Write = Callable[[IO[bytes]], object]
"""Puts a file's bytes where it is told."""


class Storage(Protocol):
    """One output folder. OSError where the store fails; FileNotFoundError where a name is not there."""

    url: str
    """What messages call it: without the secrets of a URL."""
    acts_late: bool
    """Whether what a process has asked for can happen after its end, as a request on its way through a network can."""

    @property
    def exclusive(self) -> bool:
        """Whether `create` keeps its promise; where it does not, only one worker may write."""

    def make_folder(self, name: str = "") -> None:
        """Nothing where it is there."""

    def names(self, pattern: str) -> list[str]:
        """Of the files that match, sorted. A pattern has wildcards in its last component only.

        Names that begin with a dot, as those of files that are being written, match patterns that do.
        """

    def exists(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes: ...

    def open(self, name: str) -> IO[bytes]: ...

    def arrow_file(self, name: str) -> pa.NativeFile:
        """The file for readers of Arrow, which may fetch only what they need."""

    def create(self, name: str, write: Write) -> bool:
        """Write a new file, durably; False where there is one already, or ours was removed before it was whole."""

    def replace(self, name: str, write: Write) -> None:
        """The same, whether there is one or not; where it fails, nothing has changed."""

    def append(self, name: str, line: bytes) -> None:
        """Add to the end; only one process may, of each name."""

    def move(self, source: str, target: str) -> None:
        """Nothing where `source` is not there."""

    def delete(self, name: str) -> None:
        """Nothing where it is not there."""

    def delete_folder(self, name: str) -> None: ...

    def sync(self) -> None:
        """Make moves and deletions durable."""

    def local_file(self, name: str) -> AbstractContextManager[Path]:
        """A path to write a file to that is there in whole at the end of the block, and may be before."""

    def delete_unfinished(self, folder: str, belongs: Callable[[str], bool]) -> None:
        """What writers that were killed left of the parts with such names in a folder. Nobody ever sees it, but it takes room."""


def open_storage(url: str, key: str = "output.dir") -> Storage:
    """The store that the user's `key` names; nothing is written yet."""
    if "://" in url and not url.startswith("file://"):
        from batchmix.data.object_store import ObjectStore

        return ObjectStore(url, key)
    return LocalFolder(Path(url.removeprefix("file://")))


def open_file(url: str, key: str) -> tuple[Storage, str]:
    """The store of the file that the user's `key` names, and the file's name there."""
    folder, name = os.path.split(url.rstrip("/"))
    if "://" in url and "://" not in folder:
        raise BatchmixError(f"{key}={url}: names a bucket, not a file in it")
    return open_storage(folder, key), name


def last_component(storage: Storage) -> str:
    """What people call it: `run` of s3://bucket/run, and the folder's own name of `.`"""
    return Path(storage.url).resolve().name


def reason_of(error: Exception) -> str:
    """One line of what a store fails with."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def matches(name: str, pattern: str) -> bool:
    """As a shell has it: what begins with a dot only where the pattern does."""
    return fnmatch.fnmatchcase(name, pattern) and name.startswith(".") <= pattern.startswith(".")


@contextmanager
def written(url: str, key: str) -> Iterator[None]:
    """BatchmixError where what the user's `key` names cannot be written in the block."""
    try:
        yield
    except OSError as error:
        raise BatchmixError(f"{key}={url}: cannot be written ({reason_of(error)})") from None


class LocalFolder:
    """A folder, of this machine or mounted from another. Its file system must have hard links."""

    acts_late = False
    exclusive = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = redact(str(root))

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


def read_json(storage: Storage, name: str) -> Any:
    """FileNotFoundError or ValueError where it cannot be read."""
    try:
        return json.loads(storage.read(name))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def find_json(storage: Storage, name: str) -> Any:
    """The same, None where there is no such file or it is no JSON."""
    try:
        return read_json(storage, name)
    except (FileNotFoundError, ValueError):
        return None


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    # Bytes of a path that are no UTF-8 are half surrogate pairs in it, which JSON writes as \uDCFF, as Python does.
    return text.encode(errors="backslashreplace") + b"\n"


def write_json(storage: Storage, name: str, value: Any) -> None:
    """Whole or not at all."""
    data = json_bytes(value)
    storage.replace(name, lambda file: file.write(data))


def create_json(storage: Storage, name: str, value: Any) -> bool:
    """The same, unless `name` exists already: then nothing changes and False is returned."""
    data = json_bytes(value)
    return storage.create(name, lambda file: file.write(data))


def write_text(storage: Storage, name: str, text: str) -> None:
    """The same, of a text."""
    storage.replace(name, lambda file: file.write(text.encode()))
