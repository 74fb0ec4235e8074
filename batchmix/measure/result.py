"""Where what was measured goes."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any


def save_result(folder: str | Path, device: str, what: str, result: dict[str, Any]) -> Path:
    """Write `result` and today's date to `<date>-<device>-<what>.json` in `folder`, which need not be there; its path."""
    date = datetime.date.today().isoformat()
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = Path(folder, f"{date}-{name}-{what}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"date": date, **result}, indent=1) + "\n")
    partial.replace(path)  # whole at any moment: a benchmark that saves as it goes may be killed
    return path
