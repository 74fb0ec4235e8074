"""The parts of the report, each from one of the run's files."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from batchmix.annotate.checks import checks_text
from batchmix.annotate.sample import Sample
from batchmix.observability.charts import bar_chart, calibration_chart, empty_plot, histogram, line_chart, matrix
from batchmix.observability.progress import duration
from batchmix.storage import Storage
from batchmix.storage.bookkeeping import ALL_METRICS

_MOST_BARS = 20
_MOST_LINES = 6  # shards with a line of their own
_MOST_POINTS = 400  # of a line
_RATE_SECONDS = 1.0
_METRICS = ("time", "shard", "rows", "completion_tokens", "output_tokens_per_second", "prompt_tokens_per_second",
            "kv_blocks_used", "kv_blocks_total", "running")  # fmt: skip

_TIME_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))

Lines = dict[str, list[list[tuple[float, float]]]]  # the stretches of each
Metrics = list[list[dict[str, Any]]]  # stretches of one process without a restart


def tiles(summary: dict[str, Any] | None, checks: dict[str, Any] | None, sample: Sample) -> list[tuple[str, str]]:
    """The few numbers at the top."""
    found = [("rows", f"{sample.num_rows:,}"), ("rows without an answer", f"{sample.num_errors:,}")]
    if checks is not None:
        found.append(("invalid answers", f"{checks['invalid_rows']:,}"))
        if "exact_match" in checks:
            found.append(("exact match with people", f"{checks['exact_match']['value']:.1%}"))
        if "consistent_rows" in checks:
            found.append(("rows that both orders agree on", f"{checks['consistent_rows']:,}"))
    if summary is not None:
        found += [
            ("prompt tokens", f"{summary['prompt_tokens']:,}"),
            ("completion tokens", f"{summary['completion_tokens']:,}"),
            ("output tokens/s", f"{summary['output_tokens_per_second']:,.0f}"),
            ("took", duration(summary["total_seconds"])),
            ("device busy", f"{summary['device_busy']:.1%}"),
        ]
    return found


def label_plots(checks: dict[str, Any] | None) -> list[Markup]:
    """How often each label occurs, and how often people give it."""
    plots = []
    for name, entry in (checks or {"fields": {}})["fields"].items():
        labels = entry["labels"]
        if entry["distinct"] > _MOST_BARS and max(labels.values(), default=0) <= 1:
            continue  # free text: every one occurs once
        counts = {"model": labels}
        if agreement := entry.get("agreement"):
            counts["people"] = {label: row["rows"] for label, row in agreement["classes"].items() if row["rows"]}
        totals = Counter(dict.fromkeys(labels, 0))
        for values in counts.values():
            totals.update(values)
        if not totals.total():
            plots.append(empty_plot(f"Labels of {name}", "No row has a valid answer."))
            continue
        title = f"Labels of {name}"
        if max(entry["distinct"], len(totals)) > _MOST_BARS:
            title += f": the {_MOST_BARS} most frequent"
            kept = dict(totals.most_common(_MOST_BARS))
            counts = {who: {label: values.get(label, 0) for label in kept} for who, values in counts.items()}
        plots.append(bar_chart(title, counts))
    return plots


def score_panel(checks: dict[str, Any] | None) -> dict[str, Any] | None:
    """Agreement with people; None where there is no gold column."""
    if checks is None or "exact_match" not in checks:
        return None
    plots, tables = [], []
    for name, entry in checks["fields"].items():
        agreement = entry.get("agreement")
        if agreement is None:
            continue
        labels, confusion = agreement["labels"], agreement["confusion"]
        shares = [[cell / max(1, sum(row)) for cell in row] for row in confusion]
        shown = [[f"{cell:,}" for cell in row] for row in confusion]
        plots.append(matrix(f"Confusion matrix of {name}", shares, labels, labels, shown, "people", "model"))
        rows = [[label, f"{scores['rows']:,}", *(_interval(scores[key]) for key in ("precision", "recall", "f1"))]
                for label, scores in agreement["classes"].items()]  # fmt: skip
        tables.append({"head": [name, "rows", "precision", "recall", "F1"], "rows": rows})
    name = "Calibration: accuracy over confidence"
    if "calibration" in checks:
        plots.append(calibration_chart(name, checks["calibration"]["bins"]))
    else:
        plots.append(empty_plot(name, "None of the compared answers has a confidence."))
    return {"lines": checks_text(checks).splitlines()[1:], "plots": plots, "tables": tables}


def run_plots(storage: Storage, summary: dict[str, Any] | None, sample: Sample) -> list[Markup]:
    """Lengths, throughput, KV cache and batch over time, and the load of the experts."""
    if any(sample.lengths.values()):
        lengths = histogram("Lengths", sample.lengths, "tokens", "rows")
    else:
        lengths = empty_plot("Lengths", "No row has an answer yet.")
    return [lengths, *_time_plots(_metrics(storage)), _load_plot(_expert_load(summary))]


def _time_plots(metrics: Metrics) -> list[Markup]:
    if not metrics:
        return [empty_plot("Throughput, KV cache and batch", "The run has no metrics (metrics*.jsonl).")]
    start = min(line["time"] for stretch in metrics for line in stretch)
    longest = max(line["time"] for stretch in metrics for line in stretch) - start
    seconds, unit = next((size, name) for size, name in _TIME_UNITS if longest >= 2 * size or size == 1)

    def chart(title: str, y_label: str, lines: Lines, whole: bool = False) -> Markup:
        series = {
            name: [[(time / seconds, value) for time, value in stretch] for stretch in stretches]
            for name, stretches in lines.items()
        }
        return line_chart(title, series, unit, y_label, whole)

    rates = [_with_rates(stretch) for stretch in metrics]
    throughput = _lines(rates, start, "output", lambda line: line["output_tokens_per_second"])
    if len(throughput) == 1:
        throughput |= _lines(rates, start, "prompt", lambda line: line["prompt_tokens_per_second"])
    plots = [chart("Throughput", "tokens/s", throughput)]
    cached = [stretch for stretch in metrics if stretch[0]["kv_blocks_total"]]
    if cached:
        in_use = _lines(
            cached, start, "in use", lambda line: 100 * line["kv_blocks_used"] / max(1, line["kv_blocks_total"])
        )
        plots.append(chart("KV cache in use", "percent", in_use, whole=True))
    else:
        plots.append(empty_plot("KV cache in use", "The metrics tell of no KV cache."))
    running = _lines(metrics, start, "rows", lambda line: line["running"])
    return [*plots, chart("Batch", "rows at once", running, whole=True)]


def _load_plot(load: list[list[int]]) -> Markup:
    """`load`: tokens, [layers][experts]."""
    name = "Expert load: percent of each layer's tokens"
    if not any(map(any, load)):
        return empty_plot(name, "No step of the run is counted (summary.json).")
    shares = [[cell / max(1, sum(row)) for cell in row] for row in load]
    shade = [[share * len(row) / 2 for share in row] for row in shares]  # an even load is half as dark as can be
    decimals = 1 if len(load[0]) <= 8 else 0
    shown = [[f"{100 * share:.{decimals}f}" for share in row] for row in shares]
    experts = [str(index) for index in range(len(load[0]))]
    return matrix(name, shade, [f"layer {index}" for index in range(len(load))], experts, shown, "", "expert")


def _metrics(storage: Storage) -> Metrics:
    """The lines by process: a shard that starts anew begins its counts anew."""
    stretches: dict[int, list[list[dict[str, Any]]]] = {}
    for line in (line for name in storage.names(ALL_METRICS) for line in storage.read(name).splitlines()):
        try:
            entry = json.loads(line)
            if not math.isfinite(sum(entry[key] for key in _METRICS)):
                continue
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # what a killed process was writing, or damage
        known = stretches.setdefault(entry["shard"], [])
        if (
            not known
            or entry["completion_tokens"] < known[-1][-1]["completion_tokens"]
            or entry["rows"] < known[-1][-1]["rows"]
        ):
            known.append([])
        known[-1].append(entry)
    return [stretch for known in stretches.values() for stretch in known]


def _with_rates(stretch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that end a stretch of time long enough for a rate; the first line has none yet."""
    pairs = pairwise(stretch)
    return [line for before, line in pairs if line["time"] - before["time"] >= _RATE_SECONDS] or stretch[-1:]


def _lines(metrics: Metrics, start: float, title: str, value: Callable[[dict[str, Any]], float]) -> Lines:
    """Points by title, which names the shard where there are several."""
    shards = sorted({stretch[0]["shard"] for stretch in metrics})[:_MOST_LINES]
    found: Lines = {}
    for stretch in metrics:
        shard = stretch[0]["shard"]
        if shard in shards:
            name = f"{title}, shard {shard}" if len(shards) > 1 else title
            step = -(-len(stretch) // _MOST_POINTS)
            points = [(line["time"] - start, float(value(line))) for line in stretch[::step]]
            found.setdefault(name, []).append(points)
    return found


def _expert_load(summary: dict[str, Any] | None) -> list[list[int]]:
    """Tokens by layer and expert, of all shards."""
    tables = [run["expert_tokens"] for run in (summary or {}).get("runs", []) if run.get("expert_tokens")]
    return [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def _interval(scores: dict[str, float | None]) -> str:
    if scores["value"] is None:
        return "–"
    return f"{scores['value']:.3f} ({scores['low']:.3f} to {scores['high']:.3f})"
