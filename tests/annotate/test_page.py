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
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.annotate.checks import check_results
from batchmix.annotate.config import AnnotateConfig
from batchmix.annotate.page import render, report
from batchmix.annotate.results import Results
from batchmix.config import Config
from batchmix.observability.charts import bar_chart, calibration_chart, histogram, line_chart, matrix
from batchmix.output.config import OutputConfig, OutputFormat

EVIL = (
    "</script><script>window.hacked = 1</script><img src=x onerror=hacked()> \"'`{{ 7*7 }} \u2028 \x00 \U0001f600 ünï"
)
TASK = AnnotateConfig(input="{{ text }}", choice=["good", "<b>bad</b>"], field="mood", gold="gold", report_rows=20)


class Parsed(html.parser.HTMLParser):
    """What a browser makes elements of. `rows`: the texts of the cells by column, with the attributes of the row and the
    texts and classes of the items of its list of samples."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self._cell: str | None = None
        self._item = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag == "tr" and "data-row" in found:
            self.rows.append({"attributes": found, "samples": []})
        elif tag == "td" and self.rows:
            self._cell = found["data-name"]
            self.rows[-1][self._cell] = ""
        elif tag == "li":
            self._item = True
            self.rows[-1]["samples"].append(("", found.get("class")))

    def handle_endtag(self, tag: str) -> None:
        self._cell = None if tag == "td" else self._cell
        self._item = self._item and tag != "li"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._cell is not None:
            self.rows[-1][self._cell] += data
        if self._item:
            text, style = self.rows[-1]["samples"][-1]
            self.rows[-1]["samples"][-1] = text + data, style

    def column(self, name: str) -> list[str]:
        return [row[name] for row in self.rows]


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
    assert scripts == [{}]
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"img", "iframe", "object"})
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    visible = EVIL.replace("\0", "\ufffd")
    assert sorted(parsed.column("Prompt")) == [f"Judge: {visible} number {i}" for i in range(6)]
    assert sorted(parsed.column("Model")) == sorted(["good", "<b>bad</b>", visible, "", "good", "good"])


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(evil_run(tmp_path))
    tags = Parsed(page).tags
    assert [value for _, attributes in tags for name, value in attributes.items() if name in ("src", "href")] == [
        "data:,"
    ]
    before = page.split('<table id="rows"')[0]
    assert not re.search(r"url\(|@import|//", before)
    assert "default-src 'none'" in before


def test_all_there_is_to_see(tmp_path: Path) -> None:
    parsed = Parsed(page_of(evil_run(tmp_path)))
    plots = [attributes["aria-label"] for tag, attributes in parsed.tags if tag == "svg"]
    assert plots == [
        "Labels of mood", "Confusion matrix of mood", "Calibration: accuracy over confidence", "Lengths", "Throughput",
        "KV cache in use", "Batch", "Expert load: percent of each layer's tokens",
    ]  # fmt: skip
    assert "75.0" in parsed.texts  # 60 of 80 tokens of both runs
    assert "0:01:01" in parsed.texts
    assert parsed.column("Id") == ["r2", "r3", "r1", "r0", "r4", "r5"]
    assert parsed.column("Confidence") == ["", "", "0.900", "0.500", "0.500", "0.900"]
    assert parsed.column("Error")[0].startswith("the answer ")
    assert parsed.column("Error")[1:] == ["no prompt", "", "", "", ""]
    assert parsed.column("People") == ["mood: good differs", "", "mood: good differs", *["mood: good"] * 3]


def test_all_marks_of_plots_have_a_style(tmp_path: Path) -> None:
    page = page_of(evil_run(tmp_path))
    used = {attributes["class"].split()[0] for tag, attributes in Parsed(page).tags
            if tag in ("line", "polyline", "circle", "rect") and attributes["class"]}  # fmt: skip
    assert used == {"bar", "cell", "dot", "grid", "guide", "line"}
    style = page.split("<style>")[1].split("</style>")[0]
    assert {name for name in used if f"svg .{name} {{" not in style} == set()


def test_errors_then_disagreements_then_the_least_certain_are_among_the_rows_shown(tmp_path: Path) -> None:
    texts = ["bad", None, *["good"] * 8]
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"text": f"{i}", "gold": "good" if i % 7 else None}, [texts[i % 10]]) for i in range(400)
    ]
    task = AnnotateConfig(input="{{ text }}", choice=["good", "bad"], field="mood", gold="gold", report_rows=20)
    certain = [math.log(0.2 + (i * 37 % 400) / 500) for i in range(400)]
    shown = Parsed(page_of(finished(tmp_path, task, rows, logprobs=certain, template="{{ text }}")))
    assert len(shown.rows) == 20
    groups = [0 if row["Error"] else 1 if "differs" in row["People"] else 2 for row in shown.rows]
    assert groups == sorted(groups)
    assert groups.count(0) >= 5
    assert groups.count(1) >= 5
    assert {"data-error", "data-disagrees"}.isdisjoint(shown.rows[-1]["attributes"])
    assert "data-error" in shown.rows[0]["attributes"]
    assert "data-disagrees" in shown.rows[groups.index(1)]["attributes"]
    for group in (1, 2):
        found = [float(row["Confidence"]) for row, own in zip(shown.rows, groups, strict=True) if own == group]
        assert found == sorted(found)
    least = sorted((certain[i], f"r{i}") for i in range(400) if texts[i % 10] is not None)[:5]
    assert {name for _, name in least} <= set(shown.column("Id"))
    for path in sorted(tmp_path.glob("part-*"))[:30]:  # other parts, same rows
        path.rename(path.with_name(path.name.replace("part-00000", "part-00001")))
    assert Parsed(page_of(Results(str(tmp_path)))).rows == shown.rows


@pytest.mark.parametrize("num_rows", [1, 2, 3, 500])
def test_a_table_of_few_rows_has_the_error_first(num_rows: int, tmp_path: Path) -> None:
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"text": f"{i}", "gold": "good"}, [["good", "bad", None][i % 3]]) for i in range(60)
    ]
    task = AnnotateConfig(input="{{ text }}", choice=["good", "bad"], gold="gold", report_rows=num_rows)
    shown = Parsed(page_of(finished(tmp_path, task, rows, logprobs=[-0.5] * 60, template="{{ text }}"))).rows
    assert len(shown) == min(60, num_rows)
    assert shown[0]["Error"] == "no prompt"
    assert num_rows < 2 or any("differs" in row["People"] for row in shown)


def test_all_samples_of_a_row_are_there_and_the_majority_is_marked(tmp_path: Path) -> None:
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"text": "one"}, ["bad", "good", "good", "oops"]),
        ({"text": "two"}, ["good"] * 4),
        ({"text": "three"}, [None] * 4),
    ]
    task = AnnotateConfig(input="{{ text }}", choice=["good", "bad"], field="mood")
    shown = Parsed(page_of(finished(tmp_path, task, rows, template="{{ text }}")))
    assert shown.column("Id") == ["r2", "r0", "r1"]
    assert shown.rows[1]["samples"] == [
        ("bad", None),
        ("good majority agreement 0.667", "majority"),
        ("good", None),
        ("oops invalid: the answer 'oops' is none of good, bad", None),
    ]
    assert shown.rows[2]["samples"] == [("good majority agreement 1.000", "majority"), *[("good", None)] * 3]
    assert [text for text, _ in shown.rows[0]["samples"]] == [" majority no prompt", *[" no prompt"] * 3]
    assert shown.column("Confidence") == ["", "0.667 (agreement)", "1.000 (agreement)"]


def test_samples_with_swapped_columns_say_what_they_mean(tmp_path: Path) -> None:
    task = AnnotateConfig(input="{{ a }} {{ b }}", choice=["A", "B", "tie"], swap_labels=["A", "B"])
    results = finished(tmp_path, task, [({"a": "x", "b": "y"}, ["A", "B", "A", "tie"])], template="{{ a }} {{ b }}")
    (row,) = Parsed(page_of(results)).rows
    assert [text for text, _ in row["samples"]] == [
        "A majority agreement 0.750",
        "B columns were swapped: means A",
        "A",
        "tie columns were swapped: means tie",
    ]


def test_a_run_without_a_task_shows_its_samples_too(tmp_path: Path) -> None:
    results = finished(tmp_path, AnnotateConfig(), [({"prompt": "hello", "invalid": "mine"}, ["world", "you", None])])
    (row,) = Parsed(page_of(results)).rows
    assert row["samples"] == [("world", None), ("you", None), (" no prompt", None)]
    assert row.keys() == {"attributes", "samples", "Id", "Prompt", "Model"}  # no column is empty


def test_many_long_samples_are_cut_to_what_a_row_may_take(tmp_path: Path) -> None:
    texts: list[str | None] = ["x" * 5000] * 20
    (row,) = Parsed(page_of(finished(tmp_path, AnnotateConfig(), [({"prompt": "hello"}, texts)]))).rows
    assert [text for text, _ in row["samples"]] == ["x" * 800 + "… (4,200 more characters)"] * 20


def test_only_the_fields_of_the_answer_are_compared_with_people(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}, "urgent": {"type": "boolean"}}}
    gold = {"mood": "good", "urgent": True, "who": "Ann"}
    said = json.dumps({"mood": "good", "urgent": False})
    task = AnnotateConfig(input="{{ text }}", json_schema=schema, gold="gold")
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"text": "a", "gold": gold}, [json.dumps({"mood": "good", "urgent": True})]),
        ({"text": "b", "gold": gold}, [said]),
        ({"text": "c", "gold": None}, [said]),
    ]
    shown = Parsed(page_of(finished(tmp_path, task, rows, template="{{ text }}")))
    assert shown.column("Id") == ["r1", "r0", "r2"]
    assert shown.column("People") == ["mood: goodurgent: true differs", "mood: goodurgent: true", ""]


def test_one_sample_without_a_probability_has_no_confidence(tmp_path: Path) -> None:
    task = AnnotateConfig(input="{{ text }}", choice=["good", "bad"])
    rows: list[tuple[dict[str, Any], list[str | None]]] = [({"text": "a"}, ["good"]), ({"text": "b"}, ["bad"])]
    page = page_of(finished(tmp_path, task, rows, template="{{ text }}"))
    for row in Parsed(page).rows:
        assert row["attributes"]["data-certainty"] == ""
        assert "Confidence" not in row
    assert 'value="unsure"' not in page


def test_plots_without_data_say_why_they_are_empty(tmp_path: Path) -> None:
    task = AnnotateConfig(input="{{ text }}", choice=["good", "bad"], field="mood", gold="gold")
    rows: list[tuple[dict[str, Any], list[str | None]]] = [({"text": "a", "gold": "good"}, [None])] * 3
    parsed = Parsed(page_of(finished(tmp_path, task, rows, template="{{ text }}")))
    assert "svg" not in {tag for tag, _ in parsed.tags}
    assert {"No row has a valid answer.", "No row has an answer yet.", "The run has no metrics (metrics*.jsonl).",
            "No step of the run is counted (summary.json)."} <= set(parsed.texts)  # fmt: skip
    assert "Compared with people" not in parsed.texts


def test_metrics_without_a_kv_cache_and_damaged_lines_draw_no_empty_plot(tmp_path: Path) -> None:
    results = evil_run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / ".batchmix" / "metrics.jsonl").read_text().splitlines()[:-1]]
    damaged = [{**lines[0], "running": math.nan}, {**lines[0], "running": 10**400}, {**lines[0], "running": "many"}]
    kept = [{**line, "kv_blocks_total": 0} for line in lines]
    (tmp_path / ".batchmix" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*damaged, *kept])
    )
    (tmp_path / ".batchmix" / "summary.json").unlink()
    parsed = Parsed(page_of(results))
    plots = [attributes["aria-label"] for tag, attributes in parsed.tags if tag == "svg"]
    assert plots[3:] == ["Lengths", "Throughput", "Batch"]
    assert "The metrics tell of no KV cache." in parsed.texts


@pytest.mark.parametrize(("seconds", "unit"), [(1, "seconds"), (11, "seconds"), (40, "minutes"), (4000, "hours")])
def test_time_is_told_in_units_that_give_short_numbers(seconds: int, unit: str, tmp_path: Path) -> None:
    results = evil_run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / ".batchmix" / "metrics.jsonl").read_text().splitlines()[:-1]]
    for place, line in enumerate(lines):
        line["time"] = 100 + seconds * place
    (tmp_path / ".batchmix" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Parsed(page_of(results)).texts.count(unit) == 3


def test_of_many_labels_the_most_frequent_are_drawn(tmp_path: Path) -> None:
    labels = [f"label{i}" for i in range(30)]
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"text": f"{i}"}, [label]) for i, label in enumerate(labels) for _ in range(i)
    ]
    task = AnnotateConfig(input="{{ text }}", choice=labels, field="kind")
    parsed = Parsed(page_of(finished(tmp_path, task, rows, template="{{ text }}")))
    assert "Labels of kind: the 20 most frequent" in [attributes.get("aria-label") for _, attributes in parsed.tags]
    assert {label for label in labels if label in parsed.texts[: parsed.texts.index("The run")]} == set(labels[10:])


def test_texts_that_are_long_are_cut_and_what_all_prompts_share_is_shown_once(tmp_path: Path) -> None:
    shared = "word " * 100
    rows: list[tuple[dict[str, Any], list[str | None]]] = [
        ({"text": "x" * 1_000_000}, ["good"]),
        ({"text": "short"}, ["good"]),
    ]
    page = page_of(finished(tmp_path, AnnotateConfig(input="x", choice=["good"]), rows, template=shared + "{{ text }}"))
    assert len(page) < 60_000
    parsed = Parsed(page)
    assert parsed.column("Prompt")[1] == "… short"
    assert parsed.column("Prompt")[0].endswith("more characters)")
    assert shared in parsed.texts


@pytest.mark.parametrize("form", list(OutputFormat))
def test_a_run_without_a_task_has_a_report_too(form: OutputFormat, tmp_path: Path) -> None:
    finished(tmp_path, AnnotateConfig(), [({"prompt": "hello"}, ["world"]), ({"prompt": "again"}, [None])], form=form)
    path = tmp_path / ".batchmix" / "report" / "report.html"
    assert report(Config(output=OutputConfig(dir=str(tmp_path)))) == f"the report is {path}"
    rows = Parsed(path.read_text()).rows
    assert [(row["Prompt"], row["Model"], row["Error"]) for row in rows] == [
        ("again", "", "no prompt"),
        ("hello", "world", ""),
    ]


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    results = finished(tmp_path, AnnotateConfig(), [({"prompt": "hello"}, ["world"])])
    (tmp_path / ".batchmix/SUCCESS").unlink()
    assert "The run is not finished" in page_of(results)
    next(tmp_path.glob("part-*")).unlink()
    assert Parsed(page_of(Results(str(tmp_path))))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=3, max_size=3))
def test_any_text_stays_the_same_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("run")
    page = Parsed(page_of(finished(folder, AnnotateConfig(), [({"prompt": texts[0]}, [texts[1], texts[2]])])))
    visible = [text.replace("\0", "\ufffd") for text in texts]
    assert page.column("Prompt") == visible[:1]
    assert [text for text, _ in page.rows[0]["samples"]] == visible[1:]


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
