"""Why rows could not be run: counted by reason, with an example of each."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

_MAX_REASONS = 1000
_SHOWN_CHARS = 200
_VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")  # what differs between rows that fail for one reason


@dataclass
class ErrorReason:
    """Rows that cannot be run for one reason; `example` is the error of the first of them."""

    rows: int
    example_row: int
    example: str


class ErrorReasons:
    """Counts of errors by reason; memory does not grow with their number."""

    def __init__(self) -> None:
        self._reasons: dict[str, ErrorReason] = {}

    def add(self, row: int, error: str) -> None:
        """One more row that cannot be run."""
        key = _VALUE.sub("N", error)
        if key not in self._reasons and len(self._reasons) >= _MAX_REASONS:
            key = ""  # all others together
        reason = self._reasons.setdefault(key, ErrorReason(0, row, error))
        reason.rows += 1
        if row < reason.example_row:
            reason.example_row, reason.example = row, error

    def most_common(self) -> list[ErrorReason]:
        """The reasons, those of most rows first."""
        return sorted(self._reasons.values(), key=lambda reason: (-reason.rows, reason.example_row))

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(reason) for reason in self.most_common()[:100]]


def reason_lines(reasons: list[ErrorReason], most: int = 10) -> list[str]:
    """`     12  row 3: messages is empty` for each of the most common reasons."""
    lines = [f"{reason.rows:>8,}  row {reason.example_row}: {_short(reason.example)}" for reason in reasons[:most]]
    rest = sum(reason.rows for reason in reasons[most:])
    return lines + ([f"{rest:>8,}  for other reasons"] if rest else [])


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
