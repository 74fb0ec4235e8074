"""`batchmix evaluate`: how many answers of a run are exactly the gold answers that came with its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from batchmix.annotate.metrics import wilson
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.output.finalize import is_finished
from batchmix.output.parts import Parts
from batchmix.output.stored_run import open_stored
from batchmix.storage import write_json
from batchmix.storage.bookkeeping import EVALUATION


@dataclass(frozen=True)
class Accuracy:
    """Answers that are right, of those that have a gold answer."""

    right: int
    answers: int
    without_gold: int
    low: float  # of the share that is right, 95 % interval
    high: float

    def text(self) -> str:
        left_out = f"; {self.without_gold:,} without a gold answer are left out" if self.without_gold else ""
        return (
            f"accuracy: {self.right:,} of {self.answers:,} answers exactly right ({self.right / self.answers:.1%},"
            f" 95% interval {self.low:.1%} to {self.high:.1%}){left_out}"
        )


def evaluate(config: Config) -> Accuracy:
    """Finish the run in `output.dir` where `data.path` is given, then score it, print it and write it there."""
    if config.data.path:
        from batchmix.pipeline import generate  # imports torch

        generate(config)
    parts, _ = open_stored(config.output.dir)
    if not is_finished(parts.storage):
        raise BatchmixError(
            f"output.dir={config.output.dir}: holds no finished run; give data.path too, which runs or finishes it"
        )
    accuracy = score(parts, config.evaluate.gold_column)
    write_json(parts.storage, EVALUATION, {"gold_column": config.evaluate.gold_column, **asdict(accuracy)})
    print(accuracy.text())
    return accuracy


def score(parts: Parts, gold_column: str) -> Accuracy:
    """Exact matches, whitespace at both ends aside. A failed row is a wrong answer; of n samples each counts as one."""
    right = answers = without = 0
    for name in parts.names():
        for records in parts.batches(name):
            for text, gold in _answers(records, gold_column, parts.storage.url):
                without += gold is None
                answers += gold is not None
                right += gold is not None and _plain(text) == _plain(gold)
    if not answers:
        raise BatchmixError(f"evaluate.gold_column={gold_column}: no row in {parts.storage.url} has a gold answer")
    return Accuracy(right, answers, without, *wilson(right, answers))


def _answers(records: pa.Table | list[bytes], gold_column: str, folder: str) -> Iterator[tuple[Any, Any]]:
    """Each row's answer and gold answer."""
    if not len(records):  # the mark of a worker that was succeeded
        return
    rows = records if isinstance(records, pa.Table) else pa.Table.from_pylist([json.loads(line) for line in records])
    for column in (wanted := ["generated_text", gold_column]):
        if column not in rows.schema.names:
            raise BatchmixError(
                f"evaluate.gold_column={gold_column}: {folder} has no column {column}, only"
                f" {', '.join(rows.schema.names)}"
            )
    yield from zip(*(rows[column].to_pylist() for column in wanted), strict=True)


def _plain(answer: Any) -> str | None:
    return None if answer is None else str(answer).strip()
