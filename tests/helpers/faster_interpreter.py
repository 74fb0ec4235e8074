"""Triton's interpreter without a search that takes a third of a kernel test's time.

At each call that a kernel makes of a jitted function, of tl.sum and tl.cdiv too, the interpreter looks through all of
triton.language for functions to replace by its own, though the first such call has replaced them.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter

_names: dict[Any, list[str]] = {}  # of a module's or class's functions that are replaced


def _members(owner: Any) -> list[tuple[str, Any]]:
    """What the interpreter looks for among `inspect.getmembers(owner)`: all of it, or nothing where it is replaced."""
    if owner not in _names:
        _names[owner] = [name for name, member in inspect.getmembers(owner) if is_builtin(member)]
    names = _names[owner]
    if not names or not is_builtin(getattr(owner, names[0])):
        return []
    return [(name, getattr(owner, name)) for name in names]


interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": _members})
