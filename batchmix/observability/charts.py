"""Plots as inline SVG, without a library: what the report needs and no more.

Every text goes through markupsafe, so a label from data stays text. Colours come from the style sheet of whoever shows the
plot (annotate/page.css, planning/picture.py). Each plot says what it shows in its `aria-label`, and its marks in their
`<title>`, which browsers show under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 560, 252
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 24, 40
_SERIES = 6  # colours
_LABEL_CHARS = 28
Point = tuple[float, float]


def line_chart(name: str, series: Mapping[str, Sequence[Sequence[Point]]], x_label: str, y_label: str) -> Markup:
    """Lines over time; a series is a list of stretches between which nothing is known."""
    points = [point for stretches in series.values() for stretch in stretches for point in stretch]
    right = _nice(max((x for x, _ in points), default=1.0))
    top = _nice(max((y for _, y in points), default=1.0))
    marks = []
    for number, (title, stretches) in enumerate(series.items()):
        for stretch in stretches:
            path = " ".join(f"{_x(x / right):.1f},{_y(y / top):.1f}" for x, y in stretch)
            marks.append(Markup('<polyline class="line s{}" points="{}"/>').format(number % _SERIES, path))
            for x, y in stretch:
                marks.append(_dot(_x(x / right), _y(y / top), 2.5, number, f"{title}: {_number(y)} at {_number(x)}"))
    body = Markup("").join([*_axes(right, top, x_label, y_label), *marks])
    return _figure(name, body, HEIGHT, list(series) if len(series) > 1 else [])


def histogram(name: str, series: Mapping[str, Mapping[int, int]], x_label: str, y_label: str, bins: int = 32) -> Markup:
    """How often each whole number occurs, as bars of equal width side by side."""
    body = histogram_marks(series, x_label, y_label, bins)
    return _figure(name, body, HEIGHT, list(series) if len(series) > 1 else [])


def histogram_marks(
    series: Mapping[str, Mapping[int, int]],
    x_label: str,
    y_label: str,
    bins: int = 32,
    lines: Mapping[str, int] | None = None,
) -> Markup:
    """The inside of a histogram of at most about `bins` bars, WIDTH by HEIGHT; `lines` marks values on its x-axis."""
    most = max((value for counts in series.values() for value in counts), default=0)
    width = _round_step((most + 1) / bins)
    bins = most // width + 1
    right = 4 * width * -(-bins // 4)  # so that the quarters, which carry numbers, are where bars meet
    totals = {title: [0] * bins for title in series}
    for title, counts in series.items():
        for value, count in counts.items():
            totals[title][value // width] += count
    top = _nice_count(max((total for values in totals.values() for total in values), default=1))
    marks = []
    for number, (title, values) in enumerate(totals.items()):
        share = 1 / len(totals)
        for index, total in enumerate(values):
            low, high = (_x((index + part) * width / right) for part in (share * number, share * (number + 1)))
            text = f"{title}: {total:,} of {index * width:,} to {(index + 1) * width - 1:,}"
            marks.append(_bar(low, _y(total / top), high - low, _y(0) - _y(total / top), number, text))
    for number, (title, value) in enumerate((lines or {}).items()):
        x = _x((value + 0.5) / right)
        marks.append(
            Markup(
                '<line class="mark m{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"><title>{}</title></line>'
            ).format(number, x, x, _y(0), _y(1), title)
        )
    return Markup("").join([*_axes(right, top, x_label, y_label), *marks])


def bar_chart(name: str, counts: Mapping[str, Mapping[str, int]]) -> Markup:
    """A horizontal bar for each label and series: {series: {label: rows}}."""
    labels = list(dict.fromkeys(label for values in counts.values() for label in values))
    most = max((count for values in counts.values() for count in values.values()), default=0) or 1
    thick = 20 / len(counts)
    marks = []
    for place, label in enumerate(labels):
        top = 8 + 26 * place
        marks.append(
            Markup('<text class="label" x="176" y="{}" text-anchor="end">{}</text>').format(top + 14, _short(label))
        )
        for number, (title, values) in enumerate(counts.items()):
            count, y = values.get(label, 0), top + thick * number
            length = (WIDTH - 250) * count / most
            marks.append(_bar(184, y, length, thick - 1, number, f"{title}, {label}: {count:,}"))
            marks.append(
                Markup('<text class="value" x="{:.1f}" y="{:.1f}">{:,}</text>').format(
                    190 + length, y + thick / 2 + 4, count
                )
            )
    return _figure(name, Markup("").join(marks), 16 + 26 * len(labels), list(counts) if len(counts) > 1 else [])


def matrix(
    name: str,
    cells: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    shown: Sequence[Sequence[str]],
    row_label: str,
    column_label: str,
) -> Markup:
    """A heat map: `cells` from 0 to 1 say how dark, `shown` what stands there."""
    left = 150
    wide = min(64.0, (WIDTH - left - 8) / max(1, len(columns)))
    tall = 24
    marks = [
        Markup('<text class="axis" x="{:.1f}" y="12" text-anchor="middle">{}</text>').format(
            left + wide * len(columns) / 2, column_label
        ),
        Markup('<text class="axis" x="4" y="30">{}</text>').format(row_label),
    ]
    for j, label in enumerate(columns):
        marks.append(Markup('<text class="label" x="{:.1f}" y="30" text-anchor="middle">{}<title>{}</title></text>').format(
            left + wide * (j + 0.5), _short(label, max(2, int(wide / 7))), label))  # fmt: skip
    for i, label in enumerate(rows):
        y = 38 + tall * i
        marks.append(
            Markup('<text class="label" x="{}" y="{}" text-anchor="end">{}</text>').format(
                left - 8, y + 16, _short(label, 20)
            )
        )
        for j, column in enumerate(columns):
            shade = min(1.0, max(0.0, cells[i][j]))
            marks.append(Markup(
                '<g><rect class="cell" x="{:.1f}" y="{}" width="{:.1f}" height="{}" fill-opacity="{:.3f}"/>'
                '<text class="{}" x="{:.1f}" y="{}" text-anchor="middle">{}</text><title>{}</title></g>'
            ).format(left + wide * j, y, wide - 1, tall - 1, shade, "on-dark" if shade > 0.55 else "on-light",
                     left + wide * (j + 0.5), y + 16, shown[i][j], f"{row_label} {label}, {column_label} {column}: {shown[i][j]}"))  # fmt: skip
    return _figure(name, Markup("").join(marks), 46 + tall * len(rows), [])


def calibration_chart(name: str, bins: Sequence[Mapping[str, float]]) -> Markup:
    """Accuracy over confidence; the area of a dot is the number of its rows."""
    most = max(entry["rows"] for entry in bins)
    marks = [Markup('<line class="grammar" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(_x(0), _y(0), _x(1), _y(1))]
    for entry in bins:
        text = f"confidence {entry['confidence']:.3f}, accuracy {entry['accuracy']:.3f}, {entry['rows']:,} rows"
        radius = 3 + 9 * math.sqrt(entry["rows"] / most)
        marks.append(_dot(_x(entry["confidence"]), _y(entry["accuracy"]), radius, 0, text))
    body = Markup("").join([*_axes(1.0, 1.0, "confidence", "accuracy"), *marks])
    return _figure(name, body, HEIGHT, [])


def _figure(name: str, body: Markup, height: float, legend: Sequence[str]) -> Markup:
    keys = Markup("").join(
        Markup('<span class="key s{}">{}</span>').format(number % _SERIES, title) for number, title in enumerate(legend)
    )
    return Markup(
        '<figure class="plot"><figcaption>{} {}</figcaption>'
        '<svg role="img" aria-label="{}" viewBox="0 0 {} {:.0f}">{}</svg></figure>'
    ).format(name, keys, name, WIDTH, height, body)


def _axes(right: float, top: float, x_label: str, y_label: str) -> list[Markup]:
    marks = []
    for part in (0, 0.25, 0.5, 0.75, 1):
        y = _y(part)
        marks.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(_LEFT, WIDTH - _RIGHT, y, y)
        )
        marks.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                _LEFT - 6, y + 4, _number(top * part)
            )
        )
        marks.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            _x(part), HEIGHT - 22, _number(right * part)))  # fmt: skip
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    marks.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(middle, HEIGHT - 4, x_label)
    )
    marks.append(Markup('<text class="axis" x="{}" y="10">{}</text>').format(2, y_label))
    return marks


def _bar(x: float, y: float, width: float, height: float, number: int, title: str) -> Markup:
    return Markup('<rect class="bar s{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>').format(
        number % _SERIES, x, y, max(0.0, width), max(0.0, height), title)  # fmt: skip


def _dot(x: float, y: float, radius: float, number: int, title: str) -> Markup:
    return Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>').format(
        number % _SERIES, x, y, radius, title)  # fmt: skip


def _x(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _nice(most: float) -> float:
    """The end of an axis that holds `most`: a round number, whose quarters are short too."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 5, 6, 8, 10) if step * power >= most)


def _nice_count(most: int) -> float:
    """The same for a number of things, whose quarters are whole too."""
    top = _nice(max(4, most))
    while top % 4:
        top = _nice(top + 1)
    return top


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


def _short(label: str, limit: int = _LABEL_CHARS) -> str:
    label = " ".join(label.split())
    return label if len(label) <= limit else label[: limit - 1] + "…"
