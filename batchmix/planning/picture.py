"""The picture of `batchmix plan`: prompt lengths as an SVG, or as a page that holds it. Neither loads anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from markupsafe import Markup

from batchmix.observability.charts import Frame, histogram_marks
from batchmix.planning.survey import Survey

_BINS = 60
_MARKED = (0.5, 0.99)  # shares of the rows
_HEAD = 62  # of text, above the plot
_PLOT = Frame(560, 252)
_WIDTH, _HEIGHT = _PLOT.width + 24, _PLOT.height + _HEAD + 6
# Colours stand here as such: viewers of SVG files, unlike browsers, know no CSS variables.
_STYLE = """
text { font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1b1f24; }
.name { font-size: 15px; font-weight: 600; } .tick, .axis, .note { font-size: 11px; fill: #5b6470; }
.paper { fill: #fff; } .grid { stroke: #dde1e6; } .bar { fill: #2a6fdb; stroke: #fff; stroke-width: .5; }
.mark { stroke: #1b1f24; stroke-width: 1.2; } .m1 { stroke-dasharray: 5 3; }
"""


def save_picture(survey: Survey, path: Path) -> None:
    """Write an .svg or .html of the distribution of lengths, its median and 99th percentile, and what naive batches would pad."""
    title = f"{survey.runnable:,} prompt{'s' * (survey.runnable != 1)}, {survey.prompt_tokens:,} tokens"
    drawing = _drawing(survey, title)
    text = drawing if path.suffix.lower() == ".svg" else _page(title, drawing)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")


def _drawing(survey: Survey, title: str) -> Markup:
    lengths = {int(length): int(survey.lengths[length]) for length in np.flatnonzero(survey.lengths)}
    lines = {f"{share:.0%} of rows: up to {survey.percentile(share):,}": survey.percentile(share) for share in _MARKED}
    padding = f"batches of {survey.naive_batch:,} rows in input order would be {survey.naive_padding:.1%} padding"
    keys = Markup("").join(
        Markup(
            '<line class="mark m{}" x1="{}" x2="{}" y1="50" y2="50"/><text class="note" x="{}" y="54">{}</text>'
        ).format(number, 12 + 190 * number, 34 + 190 * number, 40 + 190 * number, text)
        for number, text in enumerate(lines)
    )
    plot = histogram_marks(_PLOT, {"rows": lengths}, "prompt length in tokens", "rows", _BINS, lines)
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}">'
        '<style>{}</style><rect class="paper" width="100%" height="100%"/>'
        '<text class="name" x="12" y="20">{}</text><text class="note" x="12" y="36">{}</text>{}'
        '<g transform="translate(10 {})">{}</g></svg>'
    ).format(title, 2 * _WIDTH, 2 * _HEIGHT, _WIDTH, _HEIGHT, Markup(_STYLE), title, padding, keys, _HEAD, plot)


def _page(title: str, drawing: Markup) -> Markup:
    return Markup(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        "<title>{}</title>\n<style>body {{ margin: 24px; }} svg {{ max-width: 100%; height: auto; }}</style>\n</head>\n"
        "<body>\n{}\n</body>\n</html>"
    ).format(title, drawing)
