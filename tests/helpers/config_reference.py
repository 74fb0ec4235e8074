"""docs/configuration.md, made from the dataclasses of the configuration: `make docs` writes it, a test compares."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from batchmix.config import JOBS, Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
_HEAD = """# Configuration

Every key, with its type and its default. `batchmix JOB --help` prints the keys of a job; a key of another job is refused. Keys
are given as `group.key=value`. A text with special characters is quoted twice, for the shell and for Hydra:
`"data.template='Summarise: {{ text }}'"`. `make docs` writes this page from the code.
"""


def reference() -> str:
    """The page."""
    return _HEAD + "".join(_group(name, hint) for name, hint in typing.get_type_hints(Config).items())


def _group(name: str, group: Any) -> str:
    jobs = ", ".join(f"`{job}`" for job, groups in JOBS.items() if name in groups)
    lines = [f"\n## {name}\n\nRead by {jobs}.\n\n| key | type | default | |\n|---|---|---|---|\n"]
    for key, kind, default, text in _keys(group, ""):
        lines.append(f"| `{key}` | {kind} | {default} | {text} |\n")
    return "".join(lines)


def _keys(group: Any, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        kinds = [
            kind for kind in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(kind)
        ]
        if kinds:
            yield from _keys(kinds[0], f"{prefix}{field.name}.")
        else:
            text = " ".join(str(field.metadata.get("help") or "").split()).replace("|", "\\|")
            yield prefix + field.name, _kind(hints[field.name]), _default(field), text


def _kind(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_kind(kind) for kind in typing.get_args(hint) if kind is not type(None))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{name}`" for name in hint.__members__)
    if arguments := typing.get_args(hint):
        of = " to ".join(_kind(kind) for kind in arguments)
        return f"{'mapping' if typing.get_origin(hint) is dict else 'list'} of {of}"
    return {int: "integer", float: "number", bool: "true, false", str: "text"}.get(hint, "any")


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is MISSING or value == MISSING:
        return "must be given"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, Enum):
        return f"`{value.name}`"
    if value in (None, [], {}):
        return "null"
    return "empty" if value == "" else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
