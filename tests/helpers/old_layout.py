"""Output folders as releases left them before there was a `.batchmix/`."""

from __future__ import annotations

import json
from pathlib import Path


def to_old_layout(folder: Path) -> None:
    """Give all bookkeeping the names that it had: `_run.json` for `.batchmix/run.json`. Nobody may be at work there."""
    for path in sorted((folder / ".batchmix").iterdir()):
        path.rename(folder / f"_{path.name}")
    (folder / ".batchmix").rmdir()
    for path in folder.glob("_workers/*.json"):
        lease = json.loads(path.read_text())
        lease["folder"] = lease["folder"].replace(".batchmix/", "_")
        path.write_text(json.dumps(lease))
