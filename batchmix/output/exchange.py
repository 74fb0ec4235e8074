"""Many files of the output folder exchanged as one change, which a crash cannot leave half done.

The change is one file, the journal, created by whoever holds the lease `finalize`, under the generation of that lease.
Its steps can be done twice, also by two at once. Who takes that lease over creates the journal of the former holder, void,
if there is none yet: so a holder that wakes up late cannot begin a change any more (`batchmix/output/lease.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from batchmix.errors import BatchmixError
from batchmix.output.lease import Lease, lost
from batchmix.storage import Storage, create_json, read_json
from batchmix.storage.bookkeeping import JOURNAL, MERGE, REDO, journal_name
from batchmix.storage.layout import old_name

_VOID: dict[str, Any] = {"staging": "", "add": [], "remove": []}
# Journals that an earlier release has left say the names of its layout.
_STAGING = re.compile("|".join(rf"{re.escape(name(REDO))}|{re.escape(name(MERGE))}(-\d+)?" for name in (str, old_name)))


def exchange(storage: Storage, generation: int, staging: str, staged: Sequence[str], removed: Sequence[str]) -> None:
    """Move the staged files (below the folder `staging`) into the output folder, delete the removed ones and then
    `staging`, as one change. What a crash interrupts is finished by `finish_exchange`.

    `generation`: of the lease FINALIZE that the caller holds. Lost where it was taken over.
    """
    steps = {"staging": staging, "add": list(staged), "remove": list(removed)}
    if not create_json(storage, journal_name(generation), steps):
        raise lost(storage, "the whole")
    _do(storage, journal_name(generation), steps)


def finish_exchange(storage: Storage, lease: Lease) -> None:
    """Complete an exchange that was interrupted, if one was, and keep those who held `lease` before from beginning one."""
    for record in lease.predecessors:
        if record.needs_seal(storage):
            create_json(storage, journal_name(record.generation), _VOID)
    for name in storage.names(f"{JOURNAL}-*.json"):
        steps = _read(storage, name)
        if steps != _VOID:
            _do(storage, name, steps)
    lease.forget_predecessors()


def unfinished_exchange(storage: Storage) -> bool:
    """Whether there is one."""
    return any(_read(storage, name) != _VOID for name in storage.names(f"{JOURNAL}-*.json"))


def _read(storage: Storage, journal: str) -> dict[str, Any]:
    """BatchmixError where it is damaged: what it says is deleted."""
    try:
        steps: dict[str, Any] = read_json(storage, journal)
        staging, add, remove = steps["staging"], steps["add"], steps["remove"]
        good = steps == _VOID or (
            _STAGING.fullmatch(staging)
            and all(name.startswith(f"{staging}/") and ".." not in name for name in add)
            and not any("/" in name or name.startswith(("_", ".")) for name in remove)
        )
        if not good:
            raise ValueError("it names what no exchange does")
    except FileNotFoundError:  # another has just finished it
        return _VOID
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BatchmixError(f"output.dir={storage.url}: {journal}, a change of parts that was interrupted, is damaged "
                            f"({error}); choose another output.dir") from None  # fmt: skip
    return steps


def _do(storage: Storage, journal: str, steps: dict[str, Any]) -> None:
    for name in steps["remove"]:
        storage.delete(name)
    for name in steps["add"]:
        storage.move(name, name.rsplit("/", 1)[-1])
    storage.sync()
    storage.delete_folder(steps["staging"])  # before the journal: without it nobody would know that this is left to do
    storage.delete(journal)
