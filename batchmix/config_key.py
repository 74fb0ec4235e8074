"""What a key of the configuration is declared with; `batchmix JOB --help` prints it from here."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(default: Any, text: str) -> Any:
    """A field with its description in one line. A list or a mapping is copied for each configuration."""
    metadata = {"help": text}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
