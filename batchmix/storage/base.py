"""Where output files are kept: a folder of this machine or of a shared file system, or a place in an object store.

All that the output needs of a store is here; what people are handed (reviews, exports) is written through it too. The
one promise everything else rests on is `create`: a file appears under its name whole, at once, and only where none of that
name was; of two that try, one is told that it came too late. Names are relative to the output folder, with `/` between
folder and file.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol

import pyarrow as pa

Write = Callable[[IO[bytes]], object]
"""Puts a file's bytes where it is told."""


class Storage(Protocol):
    """One output folder. OSError where the store fails; FileNotFoundError where a name is not there."""

    url: str
    """What messages call it: without the secrets of a URL."""
    acts_late: bool
    """Whether what a process has asked for can happen after its end, as a request on its way through a network can."""

    appends: bool
    """Whether `append` takes no more than the line; else it writes the whole file anew."""

    @property
    def exclusive(self) -> bool:
        """Whether `create` keeps its promise; where it does not, only one worker may write."""

    def file_url(self, name: str) -> str:
        """What messages call a file."""

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


def reason_of(error: Exception) -> str:
    """One line of what a store fails with."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def matches(name: str, pattern: str) -> bool:
    """As a shell has it: what begins with a dot only where the pattern does."""
    return fnmatch.fnmatchcase(name, pattern) and name.startswith(".") <= pattern.startswith(".")
