"""Plots: their axes have round numbers, and no two of their texts touch, whatever the data."""

from __future__ import annotations

import math
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from batchmix.observability.chart_layout import Axis, fit_text, text_width
from batchmix.observability.charts import bar_chart, calibration_chart, empty_plot, histogram, line_chart, matrix

SUFFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
COUNTS = st.integers(0, 10**13)
LABELS = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\ufffe\uffff"), max_size=60)
# Of the characters from space to ~ in DejaVu Sans, the widest of the usual fonts, in thousandths of an em.
ADVANCES = [
    318, 401, 460, 838, 636, 950, 780, 275, 390, 390, 500, 838, 318, 361, 318, 337, 636, 636, 636, 636, 636, 636, 636, 636,
    636, 636, 337, 337, 838, 838, 838, 531, 1000, 684, 686, 698, 770, 632, 575, 775, 752, 295, 295, 656, 557, 863, 748, 787,
    603, 787, 695, 635, 611, 732, 684, 989, 685, 611, 685, 390, 337, 390, 838, 500, 500, 613, 635, 550, 635, 615, 352, 635,
    634, 278, 278, 579, 278, 974, 634, 612, 635, 635, 411, 521, 392, 634, 592, 818, 592, 592, 525, 636, 337, 636, 838,
]  # fmt: skip
PATIENT = settings(deadline=None)  # the first drawings of a busy machine take longer than 200 ms
NUMBERS = st.just(0.0) | st.floats(1e-9, 1e99)


@dataclass(frozen=True)
class Box:
    """Where a text stands, and what it is."""

    left: float
    top: float
    right: float
    bottom: float
    kind: str
    text: str

    def touches(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def svg_of(plot: Markup) -> ElementTree.Element:
    found = ElementTree.fromstring(plot).find("svg")
    assert found is not None
    return found


def boxes(svg: ElementTree.Element) -> Iterator[Box]:
    """Of all texts that are not empty; a line is 1.2 em high."""
    for text in svg.iter("text"):
        shown, kind = text.text or "", text.get("class", "")
        if not shown:
            continue
        size = 11 if kind in ("tick", "axis", "value") else 12
        wide = sum(size * width_of(char) for char in shown)
        x, y = float(text.get("x", "")), float(text.get("y", ""))
        before = {"middle": wide / 2, "end": wide}.get(text.get("text-anchor", ""), 0.0)
        up, down = 0.95 * size, 0.25 * size
        if "rotate(-90" in text.get("transform", ""):
            yield Box(x - up, y + before - wide, x + down, y + before, kind, shown)
        else:
            yield Box(x - before, y - up, x - before + wide, y + down, kind, shown)


def width_of(char: str) -> float:
    """In em: ASCII, with or without accents, as in DejaVu Sans."""
    parts = unicodedata.normalize("NFKD", char)
    if parts != char:
        return sum(map(width_of, parts)) if char != "…" else 1.0
    if char.isascii():
        return ADVANCES[ord(char) - 32] / 1000
    return 0.0 if unicodedata.category(char) in ("Mn", "Me", "Cf") else 1.0


def values_of(svg: ElementTree.Element, anchor: str) -> list[tuple[float, float]]:
    """Of an axis' ticks, middle: x, end: y, the place and the number."""
    found = []
    for tick in svg.iter("text"):
        if (tick.get("class"), tick.get("text-anchor")) == ("tick", anchor):
            place = float(tick.get("x" if anchor == "middle" else "y", "")) - (0 if anchor == "middle" else 4)
            found.append((place, number_of(tick.text or "")))
    return found


def number_of(text: str) -> float:
    digits, suffix = re.fullmatch(r"([\d,.]+(?:e[+-]?\d+)?)([kMGT]?)", text).groups()  # type: ignore[union-attr]  # fails where it is no number
    return float(digits.replace(",", "")) * SUFFIXES[suffix]


def assert_apart(plot: Markup) -> None:
    svg = svg_of(plot)
    width, height = (float(number) for number in svg.get("viewBox", "").split()[2:])
    found = sorted(boxes(svg), key=lambda box: box.left)
    for place, one in enumerate(found):
        for other in found[place + 1 :]:
            if other.left >= one.right:
                break
            assert not one.touches(other), f"{one} touches {other}"
    for box in found:
        assert box.left >= -0.1, box  # places are rounded to tenths
        assert box.top >= -1, box
        assert box.right <= width + 0.1, box
        assert box.bottom <= height, box


@PATIENT
@given(most=st.just(0.0) | st.floats(1e-300, 1e300), whole=st.booleans())
def test_ticks_stand_at_multiples_of_1_2_or_5_times_a_power_of_ten(most: float, whole: bool) -> None:
    axis = Axis.up_to(most, whole)
    numbers = [number_of(text) for _, text in axis.ticks]
    step = numbers[1]
    assert f"{step:e}"[0] in "125"
    assert float(f"{step:e}".partition("e")[0]) in (1.0, 2.0, 5.0)
    assert 2 <= len(numbers) <= 6
    assert numbers == pytest.approx([step * index for index in range(len(numbers))], rel=1e-9)
    assert numbers[-1] == pytest.approx(axis.end, rel=1e-9)
    assert most <= axis.end
    assert most == 0 or whole or numbers[-2] < most  # no interval is there for nothing
    assert not whole or all(number == int(number) for number in numbers)
    assert [share for share, _ in axis.ticks] == pytest.approx([n / (len(numbers) - 1) for n in range(len(numbers))])


@pytest.mark.parametrize(
    ("most", "shown"),
    [
        (0.2, ["0", "0.05", "0.10", "0.15", "0.20"]),
        (0.7, ["0", "0.2", "0.4", "0.6", "0.8"]),
        (1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (96, ["0", "20", "40", "60", "80", "100"]),
        (2_300, ["0", "500", "1,000", "1,500", "2,000", "2,500"]),
        (12_000, ["0", "5k", "10k", "15k"]),
        (1_100_000, ["0", "0.5M", "1.0M", "1.5M"]),
        (0.00002, ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]),
    ],
)
def test_ticks_are_short(most: float, shown: list[str]) -> None:
    assert [text for _, text in Axis.up_to(most).ticks] == shown


@PATIENT
@given(
    st.dictionaries(st.sampled_from("ab"), st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=5), min_size=1)
)
def test_texts_of_lines_are_apart(series: dict[str, list[tuple[float, float]]]) -> None:
    assert_apart(line_chart("name", {name: [points] for name, points in series.items()}, "seconds", "tokens/s"))


@PATIENT
@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)), min_size=1, max_size=20))
def test_points_stand_where_the_ticks_say(points: list[tuple[float, float]]) -> None:
    svg = svg_of(line_chart("name", {"a": [points]}, "seconds", "tokens/s"))
    (left, _), *_, (right, x_most) = values_of(svg, "middle")
    (low, _), *_, (high, y_most) = values_of(svg, "end")
    for dot, (x, y) in zip(svg.iter("circle"), points, strict=True):
        assert float(dot.get("cx", "")) == pytest.approx(left + (right - left) * x / x_most, abs=0.11)
        assert float(dot.get("cy", "")) == pytest.approx(low + (high - low) * y / y_most, abs=0.11)


@PATIENT
@given(st.dictionaries(st.integers(0, 10**6), COUNTS, max_size=30), st.dictionaries(st.integers(0, 100), COUNTS))
def test_texts_of_histograms_are_apart_and_ticks_are_where_bars_meet(one: dict[int, int], two: dict[int, int]) -> None:
    plot = histogram("Lengths", {"prompt": one, "completion": two}, "tokens", "rows")
    assert_apart(plot)
    svg = svg_of(plot)
    edges = {float(bar.get("x", "")) for bar in svg.iter("rect") if "s0" in bar.get("class", "")}
    last = max(edges)
    for place, number in values_of(svg, "middle"):
        assert number == int(number)
        assert place > last or min(abs(place - edge) for edge in edges) < 0.11


@PATIENT
@given(st.dictionaries(LABELS, COUNTS, min_size=1, max_size=20), st.dictionaries(LABELS, COUNTS, max_size=5))
def test_texts_of_bars_are_apart(model: dict[str, int], people: dict[str, int]) -> None:
    assert_apart(bar_chart("Labels", {"model": model}))
    assert_apart(bar_chart("Labels", {"model": model, "people": people}))


@settings(PATIENT, max_examples=40)
@given(st.lists(LABELS, min_size=1, max_size=52), COUNTS)
def test_texts_of_a_matrix_are_apart(labels: list[str], most: int) -> None:
    size = len(labels)
    shown = [[f"{most // (1 + i + j):,}" for j in range(size)] for i in range(size)]
    assert_apart(matrix("Confusion", [[0.5] * size] * size, labels, labels, shown, "people", "model"))


@PATIENT
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=10))
def test_texts_of_a_calibration_are_apart(bins: list[tuple[float, float, int]]) -> None:
    entries = [{"confidence": confidence, "accuracy": accuracy, "rows": rows} for confidence, accuracy, rows in bins]
    assert_apart(calibration_chart("Calibration", entries))


def test_a_matrix_with_few_columns_is_as_wide_as_other_plots_and_one_with_many_keeps_its_size() -> None:
    def drawn(size: int) -> Markup:
        labels = [f"a long label {index}" for index in range(size)]
        return matrix("m", [[0.5] * size] * size, labels, labels, [["1"] * size] * size, "people", "model")

    assert svg_of(drawn(3)).get("style") is None
    assert 'class="plot"' in drawn(3)
    width = math.ceil(float(svg_of(drawn(50)).get("viewBox", "").split()[2]))
    assert width > 50 * 24
    assert svg_of(drawn(50)).get("style") == f"min-width:{width}px"
    assert 'class="plot wide"' in drawn(50)


@PATIENT
@given(LABELS, st.floats(30, 400))
def test_a_text_is_cut_to_its_room_and_never_without_need(text: str, room: float) -> None:
    shown = fit_text(text, room, 12)
    plain = " ".join(text.split())
    assert text_width(shown, 12) <= room
    assert shown == plain if text_width(plain, 12) <= room else plain.startswith(shown[:-1]) and shown[-1] == "…"


def test_an_empty_plot_says_why() -> None:
    assert empty_plot("<b>", "No <rows>.") == (
        '<figure class="plot"><figcaption>&lt;b&gt;</figcaption><p class="faint">No &lt;rows&gt;.</p></figure>'
    )


@PATIENT
@given(st.lists(NUMBERS, min_size=2, max_size=6, unique=True))
def test_every_tick_has_a_number_of_its_own(values: list[float]) -> None:
    for most in values:
        texts = [text for _, text in Axis.up_to(most).ticks]
        assert all(one != other for one, other in pairwise(texts))
