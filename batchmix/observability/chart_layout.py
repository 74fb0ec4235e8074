"""What stands where in a plot: round numbers on an axis, and how much room a text takes."""

from __future__ import annotations

import functools
import unicodedata
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

TICK_SIZE, LABEL_SIZE = 11, 12  # pixels: the font sizes of annotate/page.css and planning/picture.py
_MOST_INTERVALS = 5
_UNITS = ((12, "T"), (9, "G"), (6, "M"), (3, "k"))
# Widths in em, rounded up from DejaVu Sans, the widest of the fonts that browsers take for system-ui.
_NARROW, _MIDDLE, _BROAD = "fijlrtI.,:;'|![]()/ -_`\\", 'abcdeghknopqsuvxyz0123456789"*?{}', "ABCDEFGHJKLMNOPQRSTUVXYZ"


@dataclass(frozen=True)
class Axis:
    """Runs from 0 to `end`, with ticks at the multiples of `step`: 1, 2 or 5 times a power of ten."""

    step: Decimal
    intervals: int

    @classmethod
    def up_to(cls, most: float, whole: bool = False) -> Axis:
        """The shortest such axis that holds `most` in at most 5 intervals. `whole`: only whole numbers have ticks."""
        largest = Decimal(str(float(most))) if most > 0 else Decimal(1)  # 0.2 is meant, not the float a little above it
        least = largest / _MOST_INTERVALS
        if whole:
            least = max(least, Decimal(1))
        power = Decimal(1).scaleb(least.adjusted())
        step = next(size * power for size in (1, 2, 5, 10) if size * power >= least)
        return cls(step, int((largest / step).to_integral_value(ROUND_CEILING)))

    @property
    def end(self) -> float:
        return float(self.step * self.intervals)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Of each tick how far along the axis it stands, from 0 to 1, and its number."""
        numbers = self._numbers([self.step * index for index in range(self.intervals + 1)])
        return [(index / self.intervals, number) for index, number in enumerate(numbers)]

    def _numbers(self, values: list[Decimal]) -> list[str]:
        most = values[-1].adjusted()
        if self.step.adjusted() < -4 or most > 14:
            return [f"{float(value):.2g}".replace("e+", "e").replace("e-0", "e-") for value in values]
        unit, letter = next(((unit, letter) for unit, letter in _UNITS if most >= max(unit, 4)), (0, ""))
        decimals = max(0, unit - self.step.adjusted())
        return [f"{value.scaleb(-unit):,.{decimals}f}{letter}" if value else "0" for value in values]


def text_width(text: str, size: float) -> float:
    """Pixels that a text takes at most, in the usual fonts."""
    return size * sum(map(_char_width, text))


def fit_text(text: str, width: float, size: float) -> str:
    """The text on one line, cut where it would be wider than `width`."""
    text = " ".join(text.split())
    if text_width(text, size) <= width:
        return text
    room = width / size - _char_width("…")
    for place, char in enumerate(text):
        room -= _char_width(char)
        if room < 0:
            return f"{text[:place].rstrip()}…"
    return text


@functools.cache
def _char_width(char: str) -> float:
    """Of an accented letter its plain one's, of a ligature that of its parts."""
    if char == "…":
        return 1.0
    return sum(map(_plain_width, unicodedata.normalize("NFKD", char)))


def _plain_width(char: str) -> float:
    if char in _NARROW:
        return 0.5
    if char in _MIDDLE:
        return 0.64
    if char in _BROAD:
        return 0.92
    if char <= "\x7f":
        return 1.0
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0.0
    return 1.15 if char < "\u0530" else 1.3  # Latin, Greek and Cyrillic; all other scripts and pictures
