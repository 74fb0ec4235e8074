"""One stored input file: how it is opened and decompressed, and what its errors are called."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from batchmix.errors import BatchmixError
from batchmix.input.config import DataFormat
from batchmix.input.decompress import decompressed


@dataclass(frozen=True)
class DataFile:
    """A file of an fsspec file system. `name` is what messages call it; `format` is never auto.

    `watch` is given the file as it is stored, and gives what is read in its place.
    """

    filesystem: Any
    path: str
    name: str
    format: DataFormat
    compression: str | None = None  # gzip, zstd, bzip2 or xz
    delimiter: str = ","  # of CSV
    encoding: str | None = None  # of CSV; None: UTF-8
    partition: tuple[tuple[str, str | None], ...] = ()  # columns that its folders' names state: lang=de/
    watch: Callable[[IO[bytes]], IO[bytes]] = field(default=lambda stored: stored, compare=False)

    @contextmanager
    def open(self, raw: bool = False) -> Iterator[IO[bytes] | io.BufferedReader]:
        """The file's bytes, decompressed unless `raw`."""
        with self.reading():
            stored: IO[bytes] = self.watch(self.filesystem.open(self.path, "rb"))
        with closing(stored):
            yield decompressed(stored, None if raw else self.compression)

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
