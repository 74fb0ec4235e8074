"""The report in Chromium: no console error, plots that show, a table that can be searched, and data that stays text.

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
from batchmix.output.config import OutputConfig

pytestmark = pytest.mark.browser
SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    task = AnnotateConfig(input="{{ text }}", choice=["good", "bad"], field="mood", gold="gold")
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"text": f"handle {i} about {'refunds' if i % 10 == 0 else 'phones'}", "gold": "bad" if i % 4 else "good"},
         ["good" if i % 3 else "bad"]) for i in range(120)
    ]  # fmt: skip
    rows[7] = ({"text": f"seven {SCRIPT}", "gold": SCRIPT}, [SCRIPT])
    rows[8] = ({"text": "eight", "gold": "good"}, [None])
    finished(folder, task, rows, logprobs=[math.log(0.3 + i / 200) for i in range(120)], template="Judge: {{ text }}")
    metrics = [{"time": 100.0 + 10 * i, "shard": 0, "rows": 30 * i, "completion_tokens": 100 * i, "prompt_tokens_per_second": 5.0,
                "output_tokens_per_second": 50.0 * i, "running": 8, "kv_blocks_used": i, "kv_blocks_total": 10} for i in range(5)]  # fmt: skip
    (folder / ".batchmix/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / ".batchmix/summary.json").write_text(json.dumps({
        "prompt_tokens": 18, "completion_tokens": 5, "output_tokens_per_second": 9.5, "total_seconds": 61.2,
        "device_busy": 0.5, "runs": [{"expert_tokens": [[30, 10], [20, 20]]}]}))  # fmt: skip
    make_report(Config(output=OutputConfig(dir=str(folder))))
    return folder / ".batchmix" / "report" / "report.html"


@pytest.fixture
def said() -> list[str]:
    """What the console said and what was asked of the network."""
    return []


@pytest.fixture
def page(report: Path, said: list[str]) -> Iterator[Any]:
    """The open report; the test fails if the console or the network had anything to say."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=["--no-sandbox"])
        opened = browser.new_page()
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.on(
            "request",
            lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
        )
        opened.goto(report.as_uri())
        yield opened
        browser.close()
    assert said == []


def shown(page: Any) -> list[list[str]]:
    return [row.locator("td").all_inner_texts() for row in page.locator("#table-body tr").all()]


def test_every_plot_shows(page: Any) -> None:
    names = page.locator("svg").evaluate_all("found => found.map(svg => svg.getAttribute('aria-label'))")
    assert {"Labels of mood", "Confusion matrix of mood", "Lengths", "Throughput", "KV cache in use", "Batch",
            "Calibration: accuracy over confidence", "Expert load: share of each layer's tokens"} == set(names)  # fmt: skip
    for plot in page.locator("svg").all():
        box = plot.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 40
        assert plot.locator("rect, polyline, circle").count() > 1
    assert (
        page.locator("svg[aria-label='Throughput'] polyline").first.evaluate("line => getComputedStyle(line).stroke")
        != "none"
    )


def test_the_table_is_searched(page: Any) -> None:
    assert page.locator("#count").inner_text() == "120 of 120 rows"
    assert len(shown(page)) == 50
    page.fill("#search", "REFUNDS handle")
    assert page.locator("#count").inner_text() == "12 of 120 rows"
    assert all("refunds" in row[1] for row in shown(page))
    page.fill("#search", "nothing like it")
    assert shown(page) == []
    page.fill("#search", "")
    page.click("#more")
    assert len(shown(page)) == 100


def test_the_table_is_filtered(page: Any) -> None:
    page.select_option("#filter", "errors")
    assert [row[0] for row in shown(page)] == ["r7", "r8"]
    assert shown(page)[1][5] == "no prompt"
    page.select_option("#filter", "wrong")
    assert all(json.loads(row[4])["mood"] != row[2] for row in shown(page) if row[0] != "r7")
    assert "r7" in [row[0] for row in shown(page)]
    page.select_option("#filter", "unsure")
    assert all(row[3] == "" or float(row[3]) < 0.9 for row in shown(page))


def test_a_row_with_a_script_stays_text(page: Any) -> None:
    page.fill("#search", "seven")
    rows = shown(page)
    assert [row[1:3] for row in rows] == [[f"Judge: seven {SCRIPT}", SCRIPT]]
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("window.hacked") is None


def test_a_script_that_got_in_would_not_run(page: Any, said: list[str]) -> None:
    page.evaluate(
        """document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 3'}))"""
    )
    assert page.evaluate("window.hacked") is None
    assert "Content Security Policy" in said.pop()


def test_a_narrow_window_has_no_sideways_scroll(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
