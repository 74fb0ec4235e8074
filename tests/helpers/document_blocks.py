"""The code blocks of README.md and docs/, and what each kind of block is.

A block says in its first line what becomes of it:

    ```bash                 run by bash in the page's folder, where `examples/` is
    ```python               run in the page's one namespace
    ```bash needs=slurm     not run, for want of it; the batchmix commands in it compose
    ```python needs=polars  run where the package is installed; `needs=model` and the like never
    ```bash install         not run: it installs
    ```yaml title="a.yaml"  a file that the page's later blocks read (json, jinja and text likewise)
    ```text output          what the block before prints
    ```text                 (console, mermaid, python-excerpt ...) to read alone
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its fence."""

    page: str
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    def value(self, name: str) -> str | None:
        """What stands after `name=` in the first line."""
        return next((word.partition("=")[2] for word in self.words if word.startswith(f"{name}=")), None)

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page; AssertionError for an indented one or a fence that is not closed."""
    found: list[Block] = []
    opened: tuple[int, str, str] | None = None
    lines: list[str] = []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"( *)```(.*)$", line)
        if fence and opened is None:
            opened, lines = (number, fence[1], fence[2]), []
        elif fence and opened is not None:
            start, indent, info = opened
            language, *words = shlex.split(info) or [""]
            text = "".join(f"{one.removeprefix(indent)}\n" for one in lines)
            found.append(Block(page, start, language, tuple(words), text))
            opened = None
        elif opened is not None:
            lines.append(line)
        else:
            assert not line.startswith("    "), f"{page}:{number}: an indented block does not say what it is; fence it"
    assert opened is None, f"{page}:{opened and opened[0]}: the fence is not closed"
    return found
