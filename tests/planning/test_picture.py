"""The picture of `batchmix plan`: what stands in it, and where."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.config import Config
from batchmix.config_checks import check
from batchmix.errors import BatchmixError
from batchmix.planning.config import PlanConfig
from batchmix.planning.picture import save_picture
from batchmix.planning.survey import Survey
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig

SVG = "{http://www.w3.org/2000/svg}"


def surveyed(lengths: list[int], batch: int = 4) -> Survey:
    survey = Survey(batch)
    list(survey.watch(Prompt(row, str(row), {}, [5] * n, SamplingConfig()) for row, n in enumerate(lengths)))
    return survey


def drawn(lengths: list[int], path: Path) -> ElementTree.Element:
    save_picture(surveyed(lengths), path)
    return ElementTree.fromstring(path.read_text())


def bars(root: ElementTree.Element) -> list[tuple[int, int, int]]:
    """(rows, shortest, longest) of each, as their titles say."""
    titles = [bar.findtext(f"{SVG}title") or "" for bar in root.iter(f"{SVG}rect") if "bar" in bar.get("class", "")]
    return [tuple(int(text) for text in re.findall(r"\d+", title.replace(",", ""))) for title in titles]  # type: ignore[misc]


def x_of(root: ElementTree.Element, length: int) -> float:
    """Where a length stands, by the numbers on the axis: its first and last."""
    ticks = [t for t in root.iter(f"{SVG}text") if (t.get("class"), t.get("text-anchor")) == ("tick", "middle")]
    (left, right), most = ((float(ticks[place].get("x", "")) for place in (0, -1)), ticks[-1].text or "")
    return left + (right - left) * (length + 0.5) / float(most.replace(",", "").replace("k", "e3"))


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 40_000), min_size=1, max_size=30))
def test_every_row_is_in_the_bar_of_its_length(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    root = drawn(lengths, tmp_path_factory.mktemp("picture") / "lengths.svg")
    found = bars(root)
    assert [count for count, _, _ in found] == [sum(low <= n <= high for n in lengths) for _, low, high in found]
    assert sum(count for count, _, _ in found) == len(lengths)
    assert len(found) <= 60


@pytest.mark.parametrize("lengths", [[1], [700], [3, 4, 4, 9, 11], [*range(1, 2001)], [32_767, 5, 5, 5]])
def test_marks_stand_at_the_median_and_the_99th_percentile(tmp_path: Path, lengths: list[int]) -> None:
    survey, root = surveyed(lengths), drawn(lengths, tmp_path / "lengths.svg")
    plot = root.find(f"{SVG}g")
    assert plot is not None
    marks = [line for line in plot.iter(f"{SVG}line") if "mark" in line.get("class", "")]
    for share, mark in zip((0.5, 0.99), marks, strict=True):
        assert float(mark.get("x1", "")) == pytest.approx(x_of(root, survey.percentile(share)), abs=0.06)
        assert f"{share:.0%} of rows: up to {survey.percentile(share):,}" in [
            text.text for text in root.iter(f"{SVG}text")
        ]


def test_it_says_how_much_naive_batches_would_pad(tmp_path: Path) -> None:
    texts = [text.text for text in drawn([10, 30, 30, 30], tmp_path / "lengths.svg").iter(f"{SVG}text")]
    assert "4 prompts, 100 tokens" in texts
    assert "batches of 4 rows in input order would be 16.7% padding" in texts  # 20 of 120 tokens


@pytest.mark.parametrize("lengths", [[1], [9_599], [32_767] * 99_999, [3, 4, 4, 9, 11]])
def test_nothing_leaves_the_picture(tmp_path: Path, lengths: list[int]) -> None:
    survey = Survey(4)
    for length in lengths:
        survey._count(length)
    save_picture(survey, tmp_path / "lengths.svg")
    root = ElementTree.fromstring((tmp_path / "lengths.svg").read_text())
    plot = root.find(f"{SVG}g")
    assert plot is not None
    left, top = (float(n) for n in re.findall(r"[\d.]+", plot.get("transform", "")))
    width, height = (float(n) for n in root.get("viewBox", "").split()[2:])
    for text in plot.iter(f"{SVG}text"):
        chars = 7 * len(text.text or "")  # pixels, of wide digits
        start = float(text.get("x", "")) - {"end": chars, "middle": chars / 2}.get(text.get("text-anchor", ""), 0)
        assert start + left >= 0
        assert start + left + chars <= width
        assert 11 <= float(text.get("y", "")) + top <= height - 3
    for bar in plot.iter(f"{SVG}rect"):
        x, y, wide, tall = (float(bar.get(key, "")) for key in ("x", "y", "width", "height"))
        assert x + left >= 0
        assert x + wide + left <= width
        assert y >= 0
        assert y + tall + top <= height


def test_numbers_of_rows_on_the_axis_are_whole(tmp_path: Path) -> None:
    for rows in range(1, 60):
        root = drawn([5] * rows, tmp_path / "lengths.svg")
        ticks = [float(t.text or "") for t in root.iter(f"{SVG}text") if t.get("class") == "tick"]
        assert all(tick == int(tick) for tick in ticks)


@pytest.mark.parametrize("name", ["", "lengths", "lengths.txt", "lengths.svg.gz", "svg"])
def test_other_kinds_of_pictures_are_refused(name: str) -> None:
    with pytest.raises(BatchmixError, match=rf"^plan\.histogram={name}: must end in \.svg or \.html; "):
        check(Config(plan=PlanConfig(histogram=name)))


def test_a_page_holds_the_picture_and_loads_nothing(tmp_path: Path) -> None:
    survey = surveyed([10, 30, 30, 30])
    save_picture(survey, tmp_path / "lengths.svg")
    save_picture(survey, tmp_path / "lengths.HTML")
    page = (tmp_path / "lengths.HTML").read_text()
    assert (tmp_path / "lengths.svg").read_text() in page
    assert "default-src 'none'" in page
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import", page)
