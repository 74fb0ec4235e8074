"""Output in an object store, through fsspec: `output.dir=s3://bucket/run`.

A file is one PUT, which the store makes visible when it has all of it: a worker killed in the middle of an upload leaves
nothing. Multipart uploads would leave pieces that nobody sees and somebody pays for, so none are made; one file has at
most 5 GiB, S3's limit for a PUT. `create` is a conditional PUT (`If-None-Match: *` on S3, `ifGenerationMatch=0` on
Google's store), which fsspec calls mode="create".
"""

from __future__ import annotations

import io
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa

from batchmix.errors import BatchmixError
from batchmix.install_hint import install_hint
from batchmix.redact import name_of
from batchmix.storage.base import Write, matches, reason_of
from batchmix.storage.bookkeeping import WORKERS

_CONDITIONAL = {"s3", "s3a", "gs", "gcs", "memory"}  # protocols whose fsspec class passes the condition to the store
_MAX_PUT = 5 << 30
_ATTEMPTS = 5
_ONE_PUT = {"chunksize": _MAX_PUT // 2}  # s3fs makes one request of what is less than two chunks


class ObjectStore:
    """A prefix of a bucket."""

    acts_late = True
    appends = False

    def __init__(self, url: str, key: str = "output.dir") -> None:
        self._address = url.rstrip("/")
        self.url = name_of(self._address)
        self._key = key  # that names it
        try:
            # A cached listing would hide what the other workers do.
            self._fs, self._root = fsspec.core.url_to_fs(self._address, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            hint = f"; {install_hint('s3')}" if url.startswith("s3") and isinstance(error, ImportError) else ""
            raise BatchmixError(f"{key}={url}: {str(error).splitlines()[0]}{hint}") from None
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._options = _ONE_PUT if "s3" in protocols else {}
        self._conditional = bool(protocols & _CONDITIONAL)
        self._appended: dict[str, bytes] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self._address, self._key)

    @property
    def exclusive(self) -> bool:
        """Tried, not believed: stores that imitate S3 may ignore the condition."""
        if not self._conditional:
            return False
        name = f"{WORKERS}/probe-{uuid.uuid4().hex}"
        try:
            self._put(name, b"1", mode="create")
            try:
                self._put(name, b"2", mode="create")
            except FileExistsError:
                return True
            return False
        finally:
            self.delete(name)

    def file_url(self, name: str) -> str:
        return f"{self.url}/{name}"

    def make_folder(self, name: str = "") -> None:
        """A key may have any prefix."""

    def names(self, pattern: str) -> list[str]:
        folder, _, last = pattern.rpartition("/")
        try:
            with _failing_as_os_error():
                found = self._fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        prefix = f"{folder}/" if folder else ""
        last_components = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)
        return sorted(prefix + name for name in last_components if matches(name, last))

    def exists(self, name: str) -> bool:
        try:  # isfile would say that what must not be read is not there
            with _failing_as_os_error():
                return bool(self._fs.info(self._path(name))["type"] == "file")
        except FileNotFoundError:
            return False

    def read(self, name: str) -> bytes:
        with _failing_as_os_error():
            data: bytes = self._fs.cat_file(self._path(name))
        return data

    def open(self, name: str) -> IO[bytes]:
        # fsspec's own files lack `readlines` of a few lines.
        return io.BufferedReader(self._fs.open(self._path(name), "rb"), 1 << 20)

    def arrow_file(self, name: str) -> pa.NativeFile:
        return pa.BufferReader(self.read(name))  # a request for each buffer of each column would take longer

    def create(self, name: str, write: Write) -> bool:
        data = _bytes(write)
        try:
            self._put(name, data, mode="create" if self._conditional else "overwrite")
        except FileExistsError:
            # A request may have been sent twice because the first answer was lost: then what is there is ours.
            return self.read(name) == data
        return True

    def replace(self, name: str, write: Write) -> None:
        self._put(name, _bytes(write), mode="overwrite")

    def append(self, name: str, line: bytes) -> None:
        if name not in self._appended:
            self._appended[name] = self.read(name) if self.exists(name) else b""
        self._appended[name] += line
        self._put(name, self._appended[name], mode="overwrite")

    def move(self, source: str, target: str) -> None:
        with suppress(FileNotFoundError), _failing_as_os_error():
            self._fs.cp_file(self._path(source), self._path(target))
            self.delete(source)

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError), _failing_as_os_error():
            self._fs.rm_file(self._path(name))

    def delete_folder(self, name: str) -> None:
        with suppress(FileNotFoundError), _failing_as_os_error():
            self._fs.rm(self._path(name), recursive=True)

    def sync(self) -> None:
        """A store answers when it is so."""

    @contextmanager
    def local_file(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="batchmix-") as folder:
            path = Path(folder, "file")
            yield path
            self._put(name, path.read_bytes(), mode="overwrite")

    def delete_unfinished(self, folder: str, belongs: Callable[[str], bool]) -> None:
        """There is nothing: an upload that was cut off is forgotten by the store."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _put(self, name: str, data: bytes, mode: str) -> None:
        if len(data) >= _MAX_PUT:
            raise BatchmixError(f"{self._key}={self.url}: {name} would have {len(data):,} bytes, and one object has at most "
                                f"{_MAX_PUT:,}; lower output.rows_per_shard or export.rows_per_file")  # fmt: skip
        for attempt in range(_ATTEMPTS):
            try:
                with _failing_as_os_error():
                    self._fs.pipe_file(self._path(name), data, mode=mode, **self._options)
                return
            except FileExistsError:
                raise
            except OSError as error:
                code = _error_code(error)
                if code in ("PreconditionFailed", "412"):
                    raise FileExistsError(name) from None
                if code != "ConditionalRequestConflict" or attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(0.1 * 2**attempt)  # another worker is just writing that name


@contextmanager
def _failing_as_os_error() -> Iterator[None]:
    """Stores raise classes of their own where there are no credentials or no connection."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(reason_of(error)) from error


def _bytes(write: Write) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _error_code(error: OSError) -> str | None:
    """What an S3 store called it."""
    response = getattr(error.__cause__, "response", None)
    return response["Error"].get("Code") if isinstance(response, dict) and "Error" in response else None
