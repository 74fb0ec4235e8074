"""Where output files are kept: `base.Storage` says what the output needs of a store, and there are two of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchmix.errors import BatchmixError
from batchmix.storage.base import Storage, Write, matches, reason_of
from batchmix.storage.local_folder import LocalFolder, sync_folder

__all__ = ["LocalFolder", "Storage", "Write", "create_json", "find_json", "json_bytes", "last_component", "matches",
           "open_file", "open_storage", "read_json", "reason_of", "sync_folder", "write_json", "write_text", "written"]  # fmt: skip


def open_storage(url: str, key: str = "output.dir") -> Storage:
    """The store that the user's `key` names; nothing is written yet."""
    if "://" in url and not url.startswith("file://"):
        from batchmix.storage.object_store import ObjectStore

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


@contextmanager
def written(url: str, key: str) -> Iterator[None]:
    """BatchmixError where what the user's `key` names cannot be written in the block."""
    try:
        yield
    except OSError as error:
        raise BatchmixError(f"{key}={url}: cannot be written ({reason_of(error)})") from None


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
