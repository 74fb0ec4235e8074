"""Plots as inline SVG, without a library: what the report needs and no more.

Every text goes through markupsafe, so a label from data stays text. Colours come from the style sheet of whoever shows the
plot (annotate/page.css, planning/picture.py). Each plot says what it shows in its `aria-label`, and its marks in their
`<title>`, which browsers show under the pointer. Texts do not touch each other: chart_layout.py says how much room each takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from batchmix.observability.chart_layout import LABEL_SIZE, TICK_SIZE, Axis, fit_text, text_width

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 28, 24, 40  # of a frame: room for ticks and names of axes
_SERIES = 6  # colours
_LABEL_ROOM = 140  # pixels for a label beside a bar or a row of a matrix
_COLUMN_ROOM = 120  # pixels for a label that stands vertical above a column
_BAR, _GAP = 14, 8  # a bar is as thick as its number is high
_CELL, _LARGEST_CELL, _CELL_HEIGHT = 24, 88, 24
Point = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """The size of a plot with axes, in pixels."""

    width: int
    height: int

    def x(self, share: float) -> float:
        return _LEFT + share * (self.width - _LEFT - _RIGHT)

    def y(self, share: float) -> float:
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)


PANEL = Frame(360, 220)  # as wide as a phone, so that its texts keep their size there


def line_chart(
    name: str, series: Mapping[str, Sequence[Sequence[Point]]], x_label: str, y_label: str, whole: bool = False
) -> Markup:
    """Lines over time; a series is a list of stretches between which nothing is known. `whole`: so are the ticks of y."""
    points = [point for stretches in series.values() for stretch in stretches for point in stretch]
    x_axis = Axis.up_to(max((x for x, _ in points), default=1.0))
    y_axis = Axis.up_to(max((y for _, y in points), default=1.0), whole)
    marks = []
    for number, (title, stretches) in enumerate(series.items()):
        for stretch in stretches:
            places = [(PANEL.x(x / x_axis.end), PANEL.y(y / y_axis.end)) for x, y in stretch]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            marks.append(Markup('<polyline class="line s{}" points="{}"/>').format(number % _SERIES, path))
            for (left, top), (x, y) in zip(places, stretch, strict=True):
                marks.append(_dot(left, top, 2.5, number, f"{title}: {_number(y)} at {_number(x)}"))
    body = Markup("").join([*_axes(PANEL, x_axis, y_axis, x_label, y_label), *marks])
    return _figure(name, body, PANEL.width, PANEL.height, list(series) if len(series) > 1 else [])


def histogram(name: str, series: Mapping[str, Mapping[int, int]], x_label: str, y_label: str, bins: int = 32) -> Markup:
    """How often each whole number occurs, as bars of equal width side by side."""
    body = histogram_marks(PANEL, series, x_label, y_label, bins)
    return _figure(name, body, PANEL.width, PANEL.height, list(series) if len(series) > 1 else [])


def histogram_marks(
    frame: Frame,
    series: Mapping[str, Mapping[int, int]],
    x_label: str,
    y_label: str,
    bins: int,
    lines: Mapping[str, int] | None = None,
) -> Markup:
    """The inside of a histogram of at most `bins` bars; `lines` marks values on its x-axis."""
    most = max((value for counts in series.values() for value in counts), default=0)
    width = _round_step((most + 1) / bins)
    bins = most // width + 1
    x_axis = Axis.up_to(bins * width, whole=True)  # its ticks are where bars meet
    totals = {title: [0] * bins for title in series}
    for title, counts in series.items():
        for value, count in counts.items():
            totals[title][value // width] += count
    y_axis = Axis.up_to(max((total for values in totals.values() for total in values), default=1), whole=True)
    marks = []
    for number, (title, values) in enumerate(totals.items()):
        share = 1 / len(totals)
        for index, total in enumerate(values):
            low, high = (
                frame.x((index + part) * width / x_axis.end) for part in (share * number, share * (number + 1))
            )
            top = frame.y(total / y_axis.end)
            text = f"{title}: {total:,} of {index * width:,} to {(index + 1) * width - 1:,}"
            marks.append(_bar(low, top, high - low, frame.y(0) - top, number, text))
    for number, (title, value) in enumerate((lines or {}).items()):
        x = frame.x((value + 0.5) / x_axis.end)
        marks.append(
            Markup(
                '<line class="mark m{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"><title>{}</title></line>'
            ).format(number, x, x, frame.y(0), frame.y(1), title)
        )
    return Markup("").join([*_axes(frame, x_axis, y_axis, x_label, y_label), *marks])


def bar_chart(name: str, counts: Mapping[str, Mapping[str, int]]) -> Markup:
    """A horizontal bar for each label and series: {series: {label: rows}}."""
    labels = list(dict.fromkeys(label for values in counts.values() for label in values))
    numbers = [count for values in counts.values() for count in values.values()]
    most = max(numbers, default=0) or 1
    left = 8 + _room(labels, _LABEL_ROOM, LABEL_SIZE)
    longest = PANEL.width - left - 10 - _room([f"{number:,}" for number in [*numbers, 0]], PANEL.width, TICK_SIZE)
    tall = _BAR * len(counts) + _GAP
    marks = []
    for place, label in enumerate(labels):
        top = _GAP + tall * place
        marks.append(_label(left - 8, top + _BAR * len(counts) / 2 + 4, "end", label, _LABEL_ROOM))
        for number, (title, values) in enumerate(counts.items()):
            count, y = values.get(label, 0), top + _BAR * number
            length = longest * count / most
            marks.append(_bar(left, y, length, _BAR - 1, number, f"{title}, {label}: {count:,}"))
            marks.append(
                Markup('<text class="value" x="{:.1f}" y="{:.1f}">{:,}</text>').format(
                    left + length + 6, y + _BAR / 2 + 4, count
                )
            )
    body = Markup("").join(marks)
    return _figure(name, body, PANEL.width, _GAP + tall * len(labels), list(counts) if len(counts) > 1 else [])


def matrix(
    name: str,
    cells: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    shown: Sequence[Sequence[str]],
    row_label: str,
    column_label: str,
) -> Markup:
    """A heat map: `cells` from 0 to 1 say how dark, `shown` what stands there. With many columns it is wider than others."""
    left = 12 + max(_room(rows, _LABEL_ROOM, LABEL_SIZE), text_width(row_label, TICK_SIZE))
    needed = max(_CELL, 4 + _room([text for row in shown for text in row], math.inf, LABEL_SIZE))
    wide = max(needed, min(_LARGEST_CELL, (PANEL.width - left - 4) / max(1, len(columns))))
    width = max(PANEL.width, left + wide * len(columns) + 4)
    vertical = 6 + max((text_width(label, LABEL_SIZE) for label in columns), default=0) > wide
    head = 38 + (_room(columns, _COLUMN_ROOM, LABEL_SIZE) - LABEL_SIZE if vertical else 0)
    marks = [
        Markup('<text class="axis" x="{:.1f}" y="12" text-anchor="{}">{}</text>').format(
            *((left, "start") if vertical else (left + wide * len(columns) / 2, "middle")), column_label
        ),
        Markup('<text class="axis" x="4" y="{:.1f}">{}</text>').format(head - 8, row_label),
    ]
    for j, label in enumerate(columns):
        x = left + wide * (j + 0.5)
        if vertical:
            marks.append(_label(x + 4, head - 8, "start", label, _COLUMN_ROOM, vertical=True))
        else:
            marks.append(_label(x, head - 8, "middle", label, wide))
    for i, label in enumerate(rows):
        y = head + _CELL_HEIGHT * i
        marks.append(_label(left - 8, y + 16, "end", label, _LABEL_ROOM))
        for j, column in enumerate(columns):
            shade = min(1.0, max(0.0, cells[i][j]))
            marks.append(Markup(
                '<g><rect class="cell" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" fill-opacity="{:.3f}"/>'
                '<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text><title>{}</title></g>'
            ).format(left + wide * j, y, wide - 1, _CELL_HEIGHT - 1, shade, "on-dark" if shade > 0.8 else "on-light",
                     left + wide * (j + 0.5), y + 16, shown[i][j], f"{row_label} {label}, {column_label} {column}: {shown[i][j]}"))  # fmt: skip
    return _figure(name, Markup("").join(marks), width, head + 8 + _CELL_HEIGHT * len(rows), [])


def calibration_chart(name: str, bins: Sequence[Mapping[str, float]]) -> Markup:
    """Accuracy over confidence; the area of a dot is the number of its rows."""
    most = max(entry["rows"] for entry in bins)
    axis = Axis.up_to(1.0)
    x, y = PANEL.x, PANEL.y
    marks = [Markup('<line class="guide" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(x(0), y(0), x(1), y(1))]
    for entry in bins:
        text = f"confidence {entry['confidence']:.3f}, accuracy {entry['accuracy']:.3f}, {entry['rows']:,} rows"
        radius = 3 + 9 * math.sqrt(entry["rows"] / most)
        marks.append(_dot(x(entry["confidence"]), y(entry["accuracy"]), radius, 0, text))
    body = Markup("").join([*_axes(PANEL, axis, axis, "confidence", "accuracy"), *marks])
    return _figure(name, body, PANEL.width, PANEL.height, [])


def empty_plot(name: str, why: str) -> Markup:
    """What stands in the place of a plot for which there is no data."""
    return Markup('<figure class="plot"><figcaption>{}</figcaption><p class="faint">{}</p></figure>').format(name, why)


def _figure(name: str, body: Markup, width: float, height: float, legend: Sequence[str]) -> Markup:
    """A plot wider than a panel keeps its size, and its figure scrolls sideways."""
    keys = Markup("").join(
        Markup('<span class="key s{}">{}</span>').format(number % _SERIES, title) for number, title in enumerate(legend)
    )
    width, height = math.ceil(width), math.ceil(height)
    wide, size = (" wide", Markup(' style="min-width:{}px"').format(width)) if width > PANEL.width else ("", "")
    return Markup(
        '<figure class="plot{}"><figcaption>{} {}</figcaption>'
        '<svg role="img" aria-label="{}" viewBox="0 0 {} {}"{}>{}</svg></figure>'
    ).format(wide, name, keys, name, width, height, size, body)


def _axes(frame: Frame, x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> list[Markup]:
    marks = []
    for share, number in y_axis.ticks:
        y = frame.y(share)
        marks.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(frame.x(0), frame.x(1), y, y)
        )
        marks.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(_LEFT - 6, y + 4, number)
        )
    for share, number in x_axis.ticks:
        marks.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            frame.x(share), frame.height - 22, number))  # fmt: skip
    marks.append(Markup('<text class="axis" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
        frame.x(0.5), frame.height - 4, x_label))  # fmt: skip
    marks.append(Markup('<text class="axis" x="2" y="10">{}</text>').format(y_label))
    return marks


def _label(x: float, y: float, anchor: str, label: str, room: float, vertical: bool = False) -> Markup:
    """A label as much of which shows as there is room for; the whole of it stands in its title."""
    turn = Markup(' transform="rotate(-90 {:.1f} {:.1f})"').format(x, y) if vertical else ""
    return Markup('<text class="label" x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}<title>{}</title></text>').format(
        x, y, anchor, turn, fit_text(label, room, LABEL_SIZE), label
    )


def _room(texts: Sequence[str], most: float, size: float) -> float:
    """Pixels for the widest of the texts, each cut to `most`."""
    return max((text_width(fit_text(text, most, size), size) for text in texts), default=0)


def _bar(x: float, y: float, width: float, height: float, number: int, title: str) -> Markup:
    return Markup('<rect class="bar s{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>').format(
        number % _SERIES, x, y, max(0.0, width), max(0.0, height), title)  # fmt: skip


def _dot(x: float, y: float, radius: float, number: int, title: str) -> Markup:
    return Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>').format(
        number % _SERIES, x, y, radius, title)  # fmt: skip


def _round_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is at least `least`."""
    power = int(10 ** max(0, math.ceil(math.log10(max(1.0, least))) - 1))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least)


def _number(value: float) -> str:
    if value >= 10_000:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= size:
                return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
