"""`.batchmix/checksums/`: of each part the checksum of its bytes, and what its writer had read of the input by then.

A file `checksums/<part>.<xxh3_128>` is created before the part. The checksum is in its name, so a listing of the folder
tells all of them; and of two writers that try to commit the same part each leaves a file of its own, so whichever part
appears has its checksum there. It says for all formats alike, and of every byte, whether a part is what was written; the
part itself stays what readers of its format expect.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import xxhash

from batchmix.errors import BatchmixError
from batchmix.input.read_log import Extent, compact
from batchmix.storage import Storage, create_json, read_json
from batchmix.storage.bookkeeping import CHECKSUMS

_READ = "read-"  # begins the names of files that only keep what was read, of parts that are no more
_READERS = 8

_log = logging.getLogger(__name__)


class Checksums:
    """Those of one output folder, which has the folder CHECKSUMS where parts are to be written."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[str, set[str]] = {}
        self._without: set[str] = set()  # parts that have none

    def keep(self, part: str, data: bytes, extents: Sequence[Extent] = ()) -> None:
        """Before a part of these bytes is committed."""
        name = _base(part)
        create_json(self._storage, f"{CHECKSUMS}/{name}.{_hash(data)}", [asdict(extent) for extent in extents])

    def check(self, part: str, data: bytes) -> None:
        """ValueError where these are not the bytes that were written; a part of an earlier release has no checksum."""
        name, digest = _base(part), _hash(data)
        if digest in self._known.get(name, ()) or name in self._without:
            return
        self._list()
        if name not in self._known:
            if not self._without:
                _log.warning("%s/%s has no checksum in %s, as parts of an earlier batchmix: damage in such a part may not be"
                             " noticed", self._storage.url, part, CHECKSUMS)  # fmt: skip
            self._without.add(name)
        elif digest not in self._known[name]:
            raise ValueError(f"its bytes are not those that were written: their checksum is not in {CHECKSUMS}")

    def extents(self) -> list[Extent]:
        """What was read of the input, by all that have committed parts."""
        names = self._storage.names(f"{CHECKSUMS}/*")
        with ThreadPoolExecutor(_READERS) as pool:
            return list(dict.fromkeys(extent for found in pool.map(self._extents, names) for extent in found))

    def sweep(self, parts: Collection[str]) -> None:
        """Forget the parts that are not among these, but not what was read for them. No other may be writing parts."""
        for unfinished in self._storage.names(f"{CHECKSUMS}/.*.tmp"):  # of writers that were killed
            self._storage.delete(unfinished)
        there = {_base(part) for part in parts}
        names = [
            name for name in self._storage.names(f"{CHECKSUMS}/*") if name.rpartition(".")[0] not in _within(there)
        ]
        if not names or all(name.startswith(f"{CHECKSUMS}/{_READ}") for name in names):
            return
        kept = compact([extent for name in names for extent in self._extents(name)])
        text = json.dumps([asdict(extent) for extent in kept])
        target = f"{CHECKSUMS}/{_READ}{_hash(text.encode())}"
        self._storage.replace(target, lambda file: file.write(text.encode()))
        for name in names:
            if name != target:
                self._storage.delete(name)
        self._known.clear()

    def _list(self) -> None:
        self._known.clear()
        for name in self._storage.names(f"{CHECKSUMS}/part-*"):
            part, _, digest = _base(name).rpartition(".")
            self._known.setdefault(part, set()).add(digest)

    def _extents(self, name: str) -> list[Extent]:
        try:
            return [_extent(entry) for entry in read_json(self._storage, name)]
        except FileNotFoundError:  # swept up meanwhile
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise BatchmixError(
                f"{self._storage.file_url(name)}: is damaged ({error}), and with it what was read of the input; delete it to go"
                " on without that"
            ) from None


def _extent(entry: dict[str, Any]) -> Extent:
    ranges = tuple((int(start), int(stop)) for start, stop in entry["ranges"])
    return Extent(int(entry["file"]), ranges, str(entry["xxh3_128"]))


def _within(parts: Collection[str]) -> set[str]:
    return {f"{CHECKSUMS}/{part}" for part in parts}


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _hash(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()
