"""`batchmix review`: the least certain rows go to people, and what they say comes back."""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchmix.annotate import argilla, label_studio
from batchmix.annotate.checks import certainty_of
from batchmix.annotate.columns import AGREEMENT, CONFIDENCE, INVALID
from batchmix.annotate.config import ReviewConfig, ReviewTool
from batchmix.annotate.corrections import Corrections, of_run, write_corrections
from batchmix.annotate.prompts import RowPrompts
from batchmix.annotate.results import Results
from batchmix.annotate.review_item import ReviewItem
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.redact import redact
from batchmix.written_config import quoted, written_text

_PLAIN = re.compile(r"[A-Za-z0-9_.:/+-]+")  # needs no quotes, neither for a shell nor for Hydra
_TOOLS = {ReviewTool.label_studio: label_studio, ReviewTool.argilla: argilla}


def review(config: Config) -> None:
    """Write the rows for `review.tool` or read its export, as `review.action` says."""
    settings = config.review
    if settings.action not in ("export", "import"):
        raise BatchmixError(f"review.action={settings.action}: must be export or import")
    if not settings.path:
        raise BatchmixError(
            "review.path is not set: the file or folder of the review, for example review.path=review.json"
        )
    results = Results(config.output.dir)
    if results.answer is None:
        raise BatchmixError(
            f"output.dir={results.url}: was not made by batchmix annotate, so there are no labels to review"
        )
    tool = _TOOLS[settings.tool]
    fields = results.answer.fields
    if settings.action == "export":
        items = least_certain(results, settings.rows)
        lines, answers = tool.write(settings.path, items, fields, results.run["config"]["model"]["path"])
        keys = {"output.dir": config.output.dir, "review.path": answers}
        if settings.tool is not ReviewConfig.tool:
            keys["review.tool"] = settings.tool.value
        for line in [*lines, _command("review import", keys)]:
            print(redact(line))
    else:
        corrections: Corrections = tool.read(settings.path, fields)
        if not corrections:
            raise BatchmixError(f"review.path={settings.path}: has no answers of people yet")
        known = of_run(corrections, results, f"review.path={settings.path}")
        if not known:
            raise BatchmixError(
                f"review.path={settings.path}: none of its {len(corrections):,} rows is in output.dir={results.url};"
                " give the output.dir that the review was exported from"
            )
        write_corrections(settings.corrections, known)
        if lost := len(corrections) - len(known):
            print(f"{lost:,} rows left out, which are not in output.dir={results.url}")
        keys = {"output.dir": config.output.dir, "export.dir": _new_folder(config),
                "export.corrections": settings.corrections}  # fmt: skip
        if other := _of_other_prompts(known, results):
            print(
                f"{other:,} rows have another prompt in output.dir={results.url}, and the ids are ordinals, which do not tell"
                " whether they are the same rows: is it the output.dir that the review was exported from?"
            )
        print(f"{len(known):,} rows reviewed; for a data set with people's answers run")
        print(redact(_command("export", keys)))


def _of_other_prompts(corrections: Corrections, results: Results) -> int:
    """How many rows whose id is their ordinal have another prompt in the run, white space aside."""
    shown = {row: said.prompt for row, said in corrections.items() if said.prompt and said.id == str(row)}
    if not shown:
        return 0
    prompts, wanted, found = RowPrompts(results), pa.array(list(shown), pa.int64()), 0
    for table in results.batches():
        for record in table.filter(pc.is_in(table["row"], value_set=wanted)).to_pylist():
            prompt = prompts.of(record)  # empty where the output kept no columns to make it of
            found += bool(prompt) and prompt.split() != str(shown[record["row"]]).split()
    return found


def _command(job: str, keys: Mapping[str, str]) -> str:
    """A command line that runs as it stands, but for secrets, which it does not show."""
    texts = {key: written_text(key, value) for key, value in keys.items()}
    overrides = [f"{key}={text}" if _PLAIN.fullmatch(text) else quoted(key, text) for key, text in texts.items()]
    return " ".join(["batchmix", job, *overrides])


def _new_folder(config: Config) -> str:
    """A folder for the data set; export.dir where it is given."""
    name = config.output.dir.rstrip("/").rpartition("/")[2]
    return config.export.dir or ("dataset" if name != "dataset" else "dataset-reviewed")


def least_certain(results: Results, num_rows: int) -> list[ReviewItem]:
    """The rows whose answers are the least certain, the worst first; rows that could not be run are not among them."""
    assert results.answer is not None
    keys = results.rows(["row", "error", INVALID.name, CONFIDENCE.name, AGREEMENT.name])
    scored = ((certainty, row["row"]) for row in keys if (certainty := certainty_of(row)) is not None)
    chosen = heapq.nsmallest(num_rows, scored)
    wanted = pa.array([row for _, row in chosen], pa.int64())
    prompts = RowPrompts(results)
    items: dict[int, ReviewItem] = {}
    for table in results.batches():
        for row in table.filter(pc.is_in(table["row"], value_set=wanted)).to_pylist():
            values: dict[str, Any] = {field.name: row[field.name] for field in results.answer.fields}
            items[row["row"]] = ReviewItem(
                row["row"], row["id"], prompts.of(row), row["generated_text"] or "", certainty_of(row) or 0.0,
                {name: value for name, value in values.items() if value is not None},
            )  # fmt: skip
    return [items[row] for _, row in chosen]
