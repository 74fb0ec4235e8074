"""The report: what is in it, and that data stays text. (test_browser.py opens it in a browser.)"""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from finished_runs import finished
from hypothesis import given
from hypothesis import strategies as st

from batchmix.annotate.checks import check_results
from batchmix.annotate.config import AnnotateConfig
from batchmix.annotate.page import _in_script, render, report
from batchmix.annotate.results import Results
from batchmix.config import Config
from batchmix.observability.charts import bar_chart, calibration_chart, histogram, line_chart, matrix
from batchmix.output.config import OutputConfig, OutputFormat

EVIL = (
    "</script><script>window.hacked = 1</script><img src=x onerror=hacked()> \"'`{{ 7*7 }} \u2028 \x00 \U0001f600 ünï"
)
TASK = AnnotateConfig(input="{{ text }}", choice=["good", "<b>bad</b>"], field="mood", gold="gold", report_rows=20)


class Parsed(html.parser.HTMLParser):
    """What a browser makes elements of."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(next(text for text in self.texts if text.startswith('[{"row"')))
        return found


def page_of(results: Results) -> str:
    gold = results.task.gold
    checks = check_results(results, gold, 50) if results.answer is not None else None
    return render(results, checks, gold, results.task.report_rows)


def evil_run(folder: Path, rows: int = 6) -> Results:
    texts: list[str | None] = ["good", "<b>bad</b>", EVIL, None, "good", "good"]
    found = [({"text": f"{EVIL} number {i}", "gold": "good"}, [texts[i % 6]]) for i in range(rows)]
    results = finished(
        folder, TASK, found, logprobs=[math.log(0.5 + 0.4 * (i % 2)) for i in range(rows)], template="Judge: {{ text }}"
    )
    metrics = [{"time": 100.0 + 10 * i, "shard": 0, "rows": i, "completion_tokens": 100 * i, "prompt_tokens_per_second": 5.0,
                "output_tokens_per_second": 50.0 * i, "running": 8, "kv_blocks_used": i, "kv_blocks_total": 10} for i in range(4)]  # fmt: skip
    (folder / ".batchmix/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"time": 1')
    run = {"expert_tokens": [[30, 10], [20, 20]]}
    (folder / ".batchmix/summary.json").write_text(json.dumps({
        "prompt_tokens": 18, "completion_tokens": 5, "output_tokens_per_second": 9.5, "total_seconds": 61.2,
        "device_busy": 0.5, "runs": [run, run]}))  # fmt: skip
    return results


def test_nothing_from_data_becomes_markup(tmp_path: Path) -> None:
    page = page_of(evil_run(tmp_path / '<img src="x">'))
    parsed = Parsed(page)
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "rows"}, {}]
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"img", "iframe", "object"})
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert [row["prompt"] for row in parsed.rows] == [f"Judge: {EVIL} number {i}" for i in range(6)]
    assert [row["answer"] for row in parsed.rows] == ["good", "<b>bad</b>", EVIL, "", "good", "good"]


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(evil_run(tmp_path))
    tags = Parsed(page).tags
    assert [value for _, attributes in tags for name, value in attributes.items() if name in ("src", "href")] == [
        "data:,"
    ]
    before = page.split('<script type="application/json"')[0]
    assert not re.search(r"url\(|@import|//", before)
    assert "default-src 'none'" in before


def test_all_there_is_to_see(tmp_path: Path) -> None:
    parsed = Parsed(page_of(evil_run(tmp_path)))
    plots = [attributes["aria-label"] for tag, attributes in parsed.tags if tag == "svg"]
    assert plots == [
        "Labels of mood", "Confusion matrix of mood", "Calibration: accuracy over confidence", "Lengths", "Throughput",
        "KV cache in use", "Batch", "Expert load: share of each layer's tokens",
    ]  # fmt: skip
    assert "75.0%" in parsed.texts  # 60 of 80 tokens of both runs
    assert "0:01:01" in parsed.texts
    rows = parsed.rows
    assert [row["right"] for row in rows] == [True, False, False, None, True, True]
    assert [row["confidence"] for row in rows] == [
        pytest.approx(c) if c is not None else None for c in (0.5, 0.9, 0.0, None, 0.5, 0.9)
    ]
    assert rows[3]["error"] == "no prompt"
    assert rows[2]["error"].startswith("the answer ")
    assert rows[0]["gold"] == '{"mood": "good"}'


def test_rows_with_errors_and_unsure_ones_are_among_those_shown(tmp_path: Path) -> None:
    results = evil_run(tmp_path, rows=120)
    rows = Parsed(page_of(results)).rows
    assert len(rows) == 20
    assert sum(row["error"] is not None for row in rows) >= 5
    assert sum(row["confidence"] == 0.5 for row in rows if row["confidence"] is not None) >= 5
    for path in sorted(tmp_path.glob("part-*"))[:30]:  # other parts, same rows
        path.rename(path.with_name(path.name.replace("part-00000", "part-00001")))
    assert Parsed(page_of(Results(str(tmp_path)))).rows == rows


def test_texts_that_are_long_are_cut_and_what_all_prompts_share_is_shown_once(tmp_path: Path) -> None:
    shared = "word " * 100
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"text": "x" * 1_000_000}, ["good"]),
        ({"text": "short"}, ["good"]),
    ]
    page = page_of(finished(tmp_path, AnnotateConfig(input="x", choice=["good"]), rows, template=shared + "{{ text }}"))
    assert len(page) < 60_000
    parsed = Parsed(page)
    assert parsed.rows[1]["prompt"] == "… short"
    assert parsed.rows[0]["prompt"].endswith("more characters)")
    assert shared in parsed.texts


@pytest.mark.parametrize("form", list(OutputFormat))
def test_a_run_without_a_task_has_a_report_too(form: OutputFormat, tmp_path: Path) -> None:
    finished(tmp_path, AnnotateConfig(), [({"prompt": "hello"}, ["world"]), ({"prompt": "again"}, [None])], form=form)
    path = tmp_path / ".batchmix" / "report" / "report.html"
    assert report(Config(output=OutputConfig(dir=str(tmp_path)))) == f"the report is {path}"
    rows = Parsed(path.read_text()).rows
    assert [(row["prompt"], row["answer"], row["error"]) for row in rows] == [
        ("hello", "world", None),
        ("again", "", "no prompt"),
    ]


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    results = finished(tmp_path, AnnotateConfig(), [({"prompt": "hello"}, ["world"])])
    (tmp_path / ".batchmix/SUCCESS").unlink()
    assert "The run is not finished" in page_of(results)
    next(tmp_path.glob("part-*")).unlink()
    assert Parsed(page_of(Results(str(tmp_path))))


@given(st.text())
def test_json_in_a_script_is_the_same_and_never_ends_it(text: str) -> None:
    inside = _in_script([text])
    assert json.loads(inside) == [text]
    assert not set(inside) & set("<>&\u2028\u2029")


@given(st.dictionaries(st.text(max_size=5), st.integers(0, 10**12), max_size=4), st.text(max_size=5))
def test_plots_of_any_label_and_number_are_well_formed(counts: dict[str, int], name: str) -> None:
    import xml.etree.ElementTree as ElementTree

    points = [[(0.0, 1.5), (float(count), 0.0)] for count in counts.values()]
    labels = list(counts)
    plots = [
        bar_chart(name, {"model": counts}),
        line_chart(name, {"a": points}, "seconds", name),
        histogram(name, {"prompt": {count % 5000: 1 for count in counts.values()}}, "tokens", "rows"),
        matrix(
            name, [[0.5] * len(labels)] * len(labels), labels, labels, [["x"] * len(labels)] * len(labels), "a", "b"
        ),
        calibration_chart(name, [{"rows": 3, "confidence": 0.5, "accuracy": 0.1}]),
    ]
    for plot in plots:
        clean = re.sub(
            "[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", plot
        )  # XML has no such characters, HTML skips them
        ElementTree.fromstring(clean)
        assert "nan" not in re.sub(r"<(title|text|figcaption)[^>]*>[^<]*<", "", clean).replace(name, "")
