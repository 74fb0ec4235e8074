"""One stored input file: how it is opened and decompressed, and what its errors are called."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import zstandard

from batchmix.config import DataFormat
from batchmix.errors import BatchmixError

if TYPE_CHECKING:
    from typing_extensions import Buffer

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_ZSTD_BLOCK_BYTES = 64 << 10
_ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` needs


@dataclass(frozen=True)
class DataFile:
    """A file of an fsspec file system. `name` is what messages call it; `format` is never auto.

    `watch` is given the file as it is stored, and gives what is read in its place.
    """

    filesystem: Any
    path: str
    name: str
    format: DataFormat
    watch: Callable[[IO[bytes]], IO[bytes]] = field(default=lambda stored: stored, compare=False)

    @property
    def compression(self) -> str | None:
        """gzip, zstd or None, from the extension."""
        path = self.path.lower().split("?")[0] if "://" in self.path else self.path.lower()
        return next((kind for suffix, kind in COMPRESSION.items() if path.endswith(suffix)), None)

    @contextmanager
    def open(self, raw: bool = False) -> Iterator[IO[bytes] | io.BufferedReader]:
        """The file's bytes, decompressed unless `raw`."""
        with self.reading():
            stored: IO[bytes] = self.watch(self.filesystem.open(self.path, "rb"))
        with closing(stored):
            compression = None if raw else self.compression
            if compression == "gzip":
                yield io.BufferedReader(gzip.GzipFile(fileobj=stored))
            elif compression == "zstd":
                yield io.BufferedReader(_ZstdFile(stored))
            else:
                yield stored

    def reading(self, row: int = 0) -> AbstractContextManager[None]:
        """See `reading`."""
        return reading(self.name, row)


@contextmanager
def reading(name: str, row: int = 0) -> Iterator[None]:
    """Turn what a damaged or vanished file raises into an error that names it. `row`: how many rows were read before.

    Storage backends and decompressors raise classes of their own, so only calls into them belong in here.
    """
    try:
        yield
    except (BatchmixError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        past = f" past row {row}" if row else ""
        raise BatchmixError(f"{name}: cannot be read{past} ({reason})") from None


class _ZstdFile(io.RawIOBase):
    """Zstandard frames, one or many; EOFError where the last one is cut off, which zstandard's own reader hides."""

    def __init__(self, stored: IO[bytes]) -> None:
        self._stored = stored
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._frame: Any = None  # None between frames
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        target = memoryview(buffer)
        while not self._ready:
            self._packed = self._packed or self._stored.read(_ZSTD_BLOCK_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the compressed file is cut off")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
