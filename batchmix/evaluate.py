"""`batchmix evaluate`: how many answers of a run are exactly the gold answers that came with its rows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from batchmix.config import Config
from batchmix.data.finalize import SUCCESS
from batchmix.data.storage import LocalFolder, open_storage, write_json
from batchmix.errors import BatchmixError

EVALUATION = "_evaluation.json"
_Z = 1.959964  # of a normal distribution's middle 95 %
_FORMATS = {"arrow": "part-*.arrow", "parquet": "part-*.parquet", "json": "part-*.jsonl"}  # pyarrow's names


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
    storage = open_storage(config.output.dir)
    if not isinstance(storage, LocalFolder):
        raise BatchmixError(f"output.dir={storage.url}: must be a folder to be evaluated; copy it to this machine")
    if config.data.path:
        from batchmix.pipeline import generate  # imports torch

        generate(config)
    folder = storage.root
    if not config.output.dir or not (folder / SUCCESS).is_file():
        raise BatchmixError(
            f"output.dir={config.output.dir}: holds no finished run; give data.path too, which runs or finishes it"
        )
    accuracy = score(folder, config.evaluate.gold_column)
    write_json(storage, EVALUATION, {"gold_column": config.evaluate.gold_column, **asdict(accuracy)})
    print(accuracy.text())
    return accuracy


def score(folder: Path, gold_column: str) -> Accuracy:
    """Exact matches, whitespace at both ends aside. A failed row is a wrong answer; of n samples each counts as one."""
    files = {form: sorted(map(str, folder.glob(pattern))) for form, pattern in _FORMATS.items()}
    form = max(files, key=lambda form: len(files[form]))
    if not files[form]:
        raise BatchmixError(f"output.dir={folder}: the run has no rows")
    data = ds.dataset(files[form], format=form)
    for column in ("generated_text", gold_column):
        if column not in data.schema.names:
            raise BatchmixError(
                f"evaluate.gold_column={gold_column}: {folder} has no column {column}, only"
                f" {', '.join(data.schema.names)}"
            )
    right = answers = without = 0
    for batch in data.to_batches(columns=["generated_text", gold_column]):
        for text, gold in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            without += gold is None
            answers += gold is not None
            right += gold is not None and _plain(text) == _plain(gold)
    if not answers:
        raise BatchmixError(f"evaluate.gold_column={gold_column}: no row in {folder} has a gold answer")
    return Accuracy(right, answers, without, *wilson(right, answers))


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which takes rows to be independent."""
    share, z2 = right / total, _Z**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _plain(answer: Any) -> str | None:
    return None if answer is None else str(answer).strip()
