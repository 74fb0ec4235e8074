"""The report in Chromium: no console error, plots that show, a table that can be searched and sorted, data that stays text,
and a page that can be read on a phone and without JavaScript.

`make test-browser` runs this and says where the browser is (CHROMIUM).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_runs import finished

from batchmix.annotate.config import AnnotateConfig
from batchmix.annotate.page import report as make_report
from batchmix.config import Config
from batchmix.observability.chart_layout import text_width
from batchmix.output.config import OutputConfig

pytestmark = pytest.mark.browser
SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    task = AnnotateConfig(input="{{ text }}", choice=["good", "bad"], field="mood", gold="gold")
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"text": f"handle {i} about {'refunds' if i % 10 == 0 else 'phones'}", "gold": "bad" if i % 4 else "good"},
         ["good" if i % 3 else "bad", "good", "bad"]) for i in range(120)
    ]  # fmt: skip
    rows[7] = ({"text": f"seven {SCRIPT}", "gold": SCRIPT}, [SCRIPT] * 3)
    rows[8] = ({"text": "eight", "gold": "good"}, [None] * 3)
    rows[9] = ({"text": f"nine {'w' * 300}", "gold": "x" * 300}, ["good"] * 3)
    finished(folder, task, rows, logprobs=[math.log(0.3 + i / 200) for i in range(120)], template="Judge: {{ text }}")
    metrics = [{"time": 100.0 + 10 * i, "shard": 0, "rows": 30 * i, "completion_tokens": 100 * i, "prompt_tokens_per_second": 5.0,
                "output_tokens_per_second": 50.0 * i, "running": 8, "kv_blocks_used": i, "kv_blocks_total": 10} for i in range(5)]  # fmt: skip
    (folder / ".batchmix/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / ".batchmix/summary.json").write_text(json.dumps({
        "prompt_tokens": 18, "completion_tokens": 5, "output_tokens_per_second": 9.5, "total_seconds": 61.2,
        "device_busy": 0.5, "runs": [{"expert_tokens": [[30 + i for i in range(8)]] * 4}]}))  # fmt: skip
    make_report(Config(output=OutputConfig(dir=str(folder))))
    return folder / ".batchmix" / "report" / "report.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def said() -> list[str]:
    """What the console said and what was asked of the network."""
    return []


@pytest.fixture
def page(chromium: Any, report: Path, said: list[str]) -> Iterator[Any]:
    """The open report; the test fails if the console or the network had anything to say."""
    opened = chromium.new_page()
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None
    )
    opened.goto(report.as_uri())
    yield opened
    opened.close()
    assert said == []


def shown(page: Any) -> list[dict[str, str]]:
    """Of each row the texts by column."""
    found: list[dict[str, str]] = page.locator("#rows tbody tr").evaluate_all(
        "rows => rows.map(row => Object.fromEntries(Array.from(row.cells, cell => [cell.dataset.name, cell.innerText])))"
    )
    return found


def certainties(page: Any) -> list[float]:
    return [float(row["Confidence"]) for row in shown(page) if row["Confidence"]]


def test_every_plot_shows(page: Any) -> None:
    names = page.locator("svg").evaluate_all("found => found.map(svg => svg.getAttribute('aria-label'))")
    assert {"Labels of mood", "Confusion matrix of mood", "Lengths", "Throughput", "KV cache in use", "Batch",
            "Calibration: accuracy over confidence", "Expert load: percent of each layer's tokens"} == set(names)  # fmt: skip
    for plot in page.locator("svg").all():
        box = plot.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 40
        assert plot.locator("rect, polyline, circle").count() > 1
    for mark in ("[aria-label='Throughput'] polyline", "[aria-label^='Calibration'] line:not(.grid)"):
        assert page.locator(f"svg{mark}").first.evaluate("line => getComputedStyle(line).stroke") != "none"


def test_texts_of_plots_do_not_touch(page: Any) -> None:
    touching = page.locator("svg").evaluate_all("""plots => plots.flatMap(plot => {
        const boxes = Array.from(plot.querySelectorAll("text"), text => ({
            text: text.firstChild?.textContent, ...text.getBoundingClientRect().toJSON()}));
        return boxes.flatMap((a, place) => boxes.slice(place + 1).filter(
            b => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom).map(
            b => [a.text, b.text]));
    })""")
    assert touching == []


def test_letters_are_no_wider_than_plots_reckon(page: Any) -> None:
    chars = [
        chr(code) for code in (*range(0x21, 0x7F), *range(0xC0, 0x250), *range(0x391, 0x3CA), *range(0x410, 0x450))
    ]
    chars += [*"…–€語한あ"]
    widths = page.evaluate(
        """chars => {
        const plot = document.querySelector("svg"), text = document.createElementNS("http://www.w3.org/2000/svg", "text");
        plot.append(text);
        const widths = chars.map(char => { text.textContent = char.repeat(20); return text.getComputedTextLength() / 20; });
        text.remove();
        return widths;
    }""",
        chars,
    )
    assert {char: width for char, width in zip(chars, widths, strict=True) if width > text_width(char, 12)} == {}


def test_the_table_is_searched(page: Any) -> None:
    assert page.locator("#count").inner_text() == "120 of 120 rows"
    assert len(shown(page)) == 50
    page.fill("#search", "REFUNDS handle")
    assert page.locator("#count").inner_text() == "12 of 120 rows"
    assert all("refunds" in row["Prompt"] for row in shown(page))
    page.fill("#search", "nothing like it")
    assert shown(page) == []
    page.fill("#search", "")
    page.click("#more")
    assert len(shown(page)) == 100


def test_the_table_is_filtered(page: Any) -> None:
    page.select_option("#filter", "errors")
    assert [row["Id"] for row in shown(page)] == ["r7", "r8"]
    assert shown(page)[1]["Error"] == "no prompt"
    page.select_option("#filter", "disagrees")
    assert len(shown(page)) == 50
    assert all("differs" in row["People"] for row in shown(page))
    assert "r7" in [row["Id"] for row in shown(page)]
    page.select_option("#filter", "unsure")
    assert all(found < 0.9 for found in certainties(page))


def test_the_table_is_sorted(page: Any) -> None:
    rows = shown(page)
    assert [row["Id"] for row in rows[:2]] == ["r7", "r8"]
    assert all("differs" in row["People"] for row in rows[2:])
    assert certainties(page) == sorted(certainties(page))
    page.select_option("#order", "unsure")
    assert [row["Id"] for row in shown(page)[:4]] == ["r7", "r0", "r1", "r2"]  # of r7 no answer is valid
    assert certainties(page) == sorted(certainties(page))
    page.select_option("#order", "sure")
    assert [row["Id"] for row in shown(page)[:2]] == ["r119", "r118"]
    assert certainties(page) == sorted(certainties(page), reverse=True)
    page.click("#more")
    page.click("#more")
    assert shown(page)[-1]["Id"] == "r8"  # which has no certainty
    page.select_option("#order", "row")
    assert [row["Id"] for row in shown(page)] == [f"r{i}" for i in range(50)]
    page.select_option("#order", "first")
    assert shown(page) == rows


def test_all_samples_show_and_the_majority_is_marked(page: Any) -> None:
    page.select_option("#order", "row")
    assert page.locator("tr[data-row='3'] li").all_inner_texts() == [
        "bad majority agreement 0.667, confidence 0.315", "good confidence 0.315", "bad confidence 0.315"
    ]  # fmt: skip


def test_a_row_with_a_script_stays_text(page: Any) -> None:
    page.fill("#search", "seven")
    (row,) = shown(page)
    assert row["Prompt"] == f"Judge: seven {SCRIPT}"
    assert row["Model"].count(SCRIPT) == 3
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("window.hacked") is None


def test_a_script_that_got_in_would_not_run(page: Any, said: list[str]) -> None:
    page.evaluate(
        """document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 3'}))"""
    )
    assert page.evaluate("window.hacked") is None
    assert "Content Security Policy" in said.pop()


def test_the_page_can_be_read_without_javascript(chromium: Any, report: Path) -> None:
    page = chromium.new_context(java_script_enabled=False).new_page()
    page.goto(report.as_uri())
    rows = page.locator("#rows tbody tr")
    assert rows.count() == 120
    assert (
        "handle 3 about phones"
        in rows.all_inner_texts()[[*page.locator("td[data-name=Id]").all_inner_texts()].index("r3")]
    )
    assert not page.locator(".controls").is_visible()
    assert not page.locator("#more").is_visible()
    page.context.close()


@pytest.mark.parametrize("width", [360, 390, 700, 1280])
def test_no_window_scrolls_sideways_and_no_text_is_tiny(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.click("#more")
    page.click("#more")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    for panel in page.locator(".panel, .plot").all():
        box = panel.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    scale = page.locator("svg").evaluate_all("plots => Math.min(...plots.map(plot => plot.getScreenCTM().a))")
    assert 11 * scale >= 9.5  # pixels of the smallest text
    sizes = page.locator("#rows td *").evaluate_all("found => found.map(e => parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 12


def test_a_table_on_a_phone_fits_without_scrolling(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 800})
    for panel in page.locator(".panel").all():
        assert panel.evaluate("panel => panel.scrollWidth <= panel.clientWidth")
    cell = page.locator("#rows tbody tr:first-child td[data-name=Prompt]")
    assert cell.evaluate("cell => getComputedStyle(cell, '::before').content") == '"Prompt"'
