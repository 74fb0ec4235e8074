"""What a run has read of its input files, as checksums: a rerun compares them before it goes on from there.

Bytes are hashed as the readers fetch them from storage, before they are decompressed, so nothing is read for the hash's
sake. An extent is what was read of one file: ranges of bytes, and the hash of all of them in that order. Of a file that is
read from its start on it is one range, which grows. Who commits a part takes the extents that are new, which
`batchmix/output/checksums.py` keeps.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import xxhash

from batchmix.input.data_file import DataFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Extent:
    """Bytes that were read of the file of that number. `ranges`: start, stop of each, in the order of reading."""

    file: int
    ranges: tuple[tuple[int, int], ...]
    xxh3_128: str

    @property
    def is_prefix(self) -> bool:
        """Whether it is the file's start, read in one go."""
        return len(self.ranges) == 1 and self.ranges[0][0] == 0


class ReadLog:
    """The extents of the files that were opened through it. Threads may read and `take` at the same time."""

    def __init__(self) -> None:
        self._files: list[_HashedFile] = []
        self._lock = threading.Lock()

    def watch(self, number: int, stored: IO[bytes]) -> IO[bytes]:
        """`stored`, the file of that number, whose bytes are hashed when they are read."""
        hashed = _HashedFile(number, stored)
        with self._lock:
            self._files.append(hashed)
        return hashed  # type: ignore[return-value]  # all of IO that readers use

    def take(self) -> list[Extent]:
        """What was read since the last call; of a file that is read from its start on, all of it anew."""
        with self._lock:
            ended = {file for file in self._files if file.closed}  # asked first: they are read by other threads
            found = [extent for file in self._files if (extent := file.take()) is not None]
            self._files = [file for file in self._files if file not in ended]
        return found


class _HashedFile(io.BufferedIOBase):
    def __init__(self, number: int, stored: IO[bytes]) -> None:
        self._number, self._stored = number, stored
        self._lock = threading.Lock()
        self._digest = xxhash.xxh3_128()
        self._ranges: list[list[int]] = []
        self._taken = True  # nothing is new

    def read(self, size: int | None = -1, /) -> bytes:
        start = self._stored.tell()
        data = self._stored.read(-1 if size is None else size)
        self._note(start, data)
        return data

    def read1(self, size: int = -1, /) -> bytes:
        return self.read(size if size >= 0 else io.DEFAULT_BUFFER_SIZE)

    def readinto(self, buffer: Buffer, /) -> int:
        target = memoryview(buffer).cast("B")
        data = self.read(len(target))
        target[: len(data)] = data
        return len(data)

    def seek(self, place: int, whence: int = 0, /) -> int:
        return self._stored.seek(place, whence)

    def tell(self) -> int:
        return self._stored.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._stored.close()
        super().close()

    def take(self) -> Extent | None:
        with self._lock:
            if self._taken:
                return None
            ranges = tuple((start, stop) for start, stop in self._ranges)
            extent = Extent(self._number, ranges, self._digest.hexdigest())
            self._taken = True
            if not extent.is_prefix:
                self._digest, self._ranges = xxhash.xxh3_128(), []
            return extent

    def _note(self, start: int, data: bytes) -> None:
        if not data:
            return
        with self._lock:
            if self._ranges and self._ranges[-1][1] == start:
                self._ranges[-1][1] += len(data)
            else:
                self._ranges.append([start, start + len(data)])
            self._digest.update(data)
            self._taken = False


def find_change(number: int, file: DataFile, extents: Iterable[Extent]) -> str | None:
    """Where the bytes of a file, the one of that number, are not what they were, in words; None where they are."""
    mine = [extent for extent in extents if extent.file == number]
    prefixes = {extent.ranges[0][1]: extent for extent in mine if extent.is_prefix}
    if sum(extent.is_prefix for extent in mine) > 1:  # two runs may have read the same bytes and seen others
        same_length = {(extent.ranges[0][1], extent.xxh3_128) for extent in mine if extent.is_prefix}
        if len(same_length) > len(prefixes):
            return "among the bytes that one of two workers has read"
    with file.open(raw=True) as opened, file.reading():
        digest, end = xxhash.xxh3_128(), 0
        for stop in sorted(prefixes):
            _hash_range(opened, digest, end, stop)
            if digest.hexdigest() != prefixes[stop].xxh3_128:
                return f"between its bytes {end:,} and {stop:,}"
            end = stop
        for extent in mine:
            if extent.is_prefix:
                continue
            digest = xxhash.xxh3_128()
            for start, stop in extent.ranges:
                _hash_range(opened, digest, start, stop)
            if digest.hexdigest() != extent.xxh3_128:
                return f"between its bytes {min(extent.ranges)[0]:,} and {max(stop for _, stop in extent.ranges):,}"
    return None


def compact(extents: Sequence[Extent]) -> list[Extent]:
    """The same without those that others cover: of each file the longest prefix, and each other extent once."""
    longest: dict[int, Extent] = {}
    for extent in extents:
        if extent.is_prefix:
            known = longest.get(extent.file)
            if known is None or known.ranges[0][1] < extent.ranges[0][1]:
                longest[extent.file] = extent
    others = dict.fromkeys(extent for extent in extents if not extent.is_prefix)
    return [*longest.values(), *others]


def _hash_range(opened: IO[bytes] | io.BufferedReader, digest: xxhash.xxh3_128, start: int, stop: int) -> None:
    opened.seek(start)
    while start < stop:
        block = opened.read(min(_BLOCK_BYTES, stop - start))
        if not block:
            return  # the file is shorter now, and so the hash is another
        digest.update(block)
        start += len(block)
