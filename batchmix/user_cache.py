"""Where this user's files lie that can be made again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache(name: str) -> Path:
    """A folder of that name, which may not be there yet."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "batchmix" / name


def write_whole(path: Path, content: bytes) -> None:
    """Write a file and the folders that it needs. Others who read or write the same see it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
