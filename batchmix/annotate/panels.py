"""The parts of the report, each from one of the run's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from batchmix.annotate.checks import checks_text
from batchmix.annotate.sample import Sample
from batchmix.observability.charts import bar_chart, calibration_chart, histogram, line_chart, matrix
from batchmix.observability.progress import duration
from batchmix.storage import Storage
from batchmix.storage.bookkeeping import ALL_METRICS

_MOST_BARS = 20
_MOST_LINES = 6  # shards with a line of their own
_MOST_POINTS = 400  # of a line
_RATE_SECONDS = 1.0
_METRICS = ("time", "shard", "rows", "completion_tokens", "output_tokens_per_second", "prompt_tokens_per_second",
            "kv_blocks_used", "kv_blocks_total", "running")  # fmt: skip

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
        labels = dict(list(entry["labels"].items())[:_MOST_BARS])
        if entry["distinct"] > _MOST_BARS and max(labels.values(), default=0) <= 1:
            continue  # free text: every one occurs once
        counts = {"model": labels}
        if agreement := entry.get("agreement"):
            people = {label: scores["rows"] for label, scores in agreement["classes"].items() if scores["rows"]}
            counts["people"] = people
        if any(counts.values()):
            plots.append(bar_chart(f"Labels of {name}", counts))
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
    if "calibration" in checks:
        plots.append(calibration_chart("Calibration: accuracy over confidence", checks["calibration"]["bins"]))
    return {"lines": checks_text(checks).splitlines()[1:], "plots": plots, "tables": tables}


def run_plots(storage: Storage, summary: dict[str, Any] | None, sample: Sample) -> list[Markup]:
    """Lengths, throughput, KV cache and batch over time, and the load of the experts."""
    plots = [histogram("Lengths", sample.lengths, "tokens", "rows")] if any(sample.lengths.values()) else []
    metrics = _metrics(storage)
    if metrics:
        start = min(stretch[0]["time"] for stretch in metrics)
        rates = [_with_rates(stretch) for stretch in metrics]
        output = _lines(rates, start, lambda line: line["output_tokens_per_second"])
        prompt = _lines(rates, start, lambda line: line["prompt_tokens_per_second"])
        throughput = {f"output{key}": value for key, value in output.items()}
        throughput |= {f"prompt{key}": value for key, value in prompt.items()} if len(output) == 1 else {}
        plots.append(line_chart("Throughput", throughput, "seconds", "tokens/s"))
        kv = _lines(metrics, start, lambda line: 100 * line["kv_blocks_used"] / max(1, line["kv_blocks_total"]))
        plots.append(
            line_chart("KV cache in use", {f"in use{key}": value for key, value in kv.items()}, "seconds", "percent")
        )
        running = _lines(metrics, start, lambda line: line["running"])
        plots.append(
            line_chart("Batch", {f"rows{key}": value for key, value in running.items()}, "seconds", "rows at once")
        )
    load = _expert_load(summary)
    if load:
        shares = [[cell / max(1, sum(row)) for cell in row] for row in load]
        shade = [[share * len(row) / 2 for share in row] for row in shares]  # an even load is half as dark as can be
        shown = [[f"{share:.1%}" if len(load[0]) <= 8 else f"{100 * share:.0f}" for share in row] for row in shares]
        names = [str(index) for index in range(len(load[0]))]
        plots.append(matrix("Expert load: share of each layer's tokens", shade, [f"layer {i}" for i in range(len(load))],
                            names, shown, "", "expert"))  # fmt: skip
    return plots


def _metrics(storage: Storage) -> Metrics:
    """The lines by process: a shard that starts anew begins its counts anew."""
    stretches: dict[int, list[list[dict[str, Any]]]] = {}
    for line in (line for name in storage.names(ALL_METRICS) for line in storage.read(name).splitlines()):
        try:
            entry = json.loads(line)
            float(sum(entry[key] for key in _METRICS))
        except (ValueError, KeyError, TypeError, RecursionError):  # what a killed process was writing, or damage
            continue
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


def _lines(metrics: Metrics, start: float, value: Any) -> dict[str, list[Sequence[tuple[float, float]]]]:
    """Points by shard; where there is but one its name is empty."""
    shards = sorted({stretch[0]["shard"] for stretch in metrics})[:_MOST_LINES]
    found: dict[str, list[Sequence[tuple[float, float]]]] = {}
    for stretch in metrics:
        shard = stretch[0]["shard"]
        if shard in shards:
            name = f", shard {shard}" if len(shards) > 1 else ""
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
