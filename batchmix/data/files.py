"""Changes to a folder that a crash cannot leave half done: atomic files, and many files exchanged as one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

JOURNAL = "_journal.json"


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `path` whole and durable at the end of the block, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    with atomic_file(path) as file:
        # Bytes of a path that are no UTF-8 are half surrogate pairs in it, which JSON writes as \uDCFF, as Python does.
        file.write(text.encode(errors="backslashreplace") + b"\n")


def create_json(path: Path, value: Any) -> bool:
    """The same, unless `path` exists already: then nothing changes and False is returned."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_json(temporary, value)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True


def exchange(folder: Path, staging: Path, staged: Sequence[Path], removed: Sequence[Path]) -> None:
    """Move the staged files (below `staging`, a subfolder of `folder`) into `folder`, delete the removed ones and then
    `staging`, as one change. What a crash interrupts is finished by `finish_exchange`.
    """
    moves = [str(path.relative_to(folder)) for path in staged]
    steps = {"staging": staging.name, "add": moves, "remove": [path.name for path in removed]}
    write_json(folder / JOURNAL, steps)
    finish_exchange(folder)


def finish_exchange(folder: Path) -> None:
    """Complete an exchange that was interrupted, if one was. Every step may be done twice."""
    journal = folder / JOURNAL
    if not journal.is_file():
        return
    steps = json.loads(journal.read_text())
    for name in steps["remove"]:
        (folder / name).unlink(missing_ok=True)
    for name in steps["add"]:
        source = folder / name
        if source.exists():
            source.rename(folder / source.name)
    sync_folder(folder)
    if (folder / steps["staging"]).exists():  # before the journal: without it nobody would know that this is left to do
        shutil.rmtree(folder / steps["staging"])
    journal.unlink()
    sync_folder(folder)
