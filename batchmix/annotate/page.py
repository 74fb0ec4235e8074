"""`report.html`: one file that shows a run to a person. It loads nothing, and nothing from data can become markup in it.

Texts from data go into the page through Jinja's escaping, labels of plots through markupsafe. Should a hole be found all the
same, the page's content security policy runs no script but ours. All that the page shows is in its HTML, so it can be read
without JavaScript; the script only searches, filters and sorts the rows that are there.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from batchmix.annotate.checks import checks_text, write_checks
from batchmix.annotate.config import AnnotateConfig
from batchmix.annotate.panels import label_plots, run_plots, score_panel, tiles
from batchmix.annotate.results import Results
from batchmix.annotate.sample import read_sample
from batchmix.config import Config
from batchmix.storage import find_json, write_text, written
from batchmix.storage.bookkeeping import REPORT, REPORT_FOLDER, SUMMARY

_HERE = Path(__file__).parent


def report(config: Config) -> str:
    """Write the report and, of a task's run, its checks; returns what to print."""
    results = Results(config.output.dir)
    if results.answer is None or not results.names:
        return f"the report is {write_report(results, config.annotate, None)}"
    checks = write_checks(results, _gold(config.annotate, results), config.annotate.bootstrap)
    return f"{checks_text(checks)}\nthe report is {write_report(results, config.annotate, checks)}"


def write_report(results: Results, settings: AnnotateConfig, checks: dict[str, Any] | None) -> str:
    """Write the report of a run and return where it is. `checks`: those of its labels, if it has any."""
    page = render(results, checks, _gold(settings, results), settings.report_rows)
    with written(results.url, "output.dir"):
        results.storage.make_folder(REPORT_FOLDER)
        write_text(results.storage, REPORT, page)
    return results.storage.file_url(REPORT)


def _gold(settings: AnnotateConfig, results: Results) -> Any:
    """Where people's answers are: as asked for now, or else as the run's task says."""
    return results.task.gold if settings.gold is None else settings.gold


def render(results: Results, checks: dict[str, Any] | None, gold: Any, num_rows: int) -> str:
    """The page."""
    sample = read_sample(results, gold, num_rows)
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    summary = find_json(results.storage, SUMMARY)
    run = results.run
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_without_nul)
    return environment.from_string((_HERE / "page.html").read_text(encoding="utf-8")).render(
        title=results.title,
        subtitle=f"{run['config']['model']['path']} on {run['config']['data']['path']}, batchmix {run['versions']['batchmix']}",
        warning="" if results.complete else "The run is not finished: this is what is there so far.",
        tiles=tiles(summary, checks, sample),
        labels=label_plots(checks),
        scores=score_panel(checks),
        plots=run_plots(results.storage, summary, sample),
        sampling=sample.description,
        shared_prompt=sample.shared_prompt,
        settings=json.dumps(run["config"], indent=2, ensure_ascii=False),
        rows=sample.rows,
        has={"people": any(row.people for row in sample.rows),
             "confidence": any(row.confidence for row in sample.rows),
             "error": any(row.error is not None for row in sample.rows)},
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )  # fmt: skip


def _without_nul(value: Any) -> Any:
    """HTML cannot hold the character NUL; browsers leave it out of texts, which would show two texts as one."""
    return value.replace("\0", "\ufffd") if isinstance(value, str) else value
