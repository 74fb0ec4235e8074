"""`batchmix annotate`: the run of a task, then its checks and its report."""

from __future__ import annotations

from batchmix.annotate.task import prepare
from batchmix.config import Config
from batchmix.pipeline import generate


def annotate(config: Config) -> None:
    """Run the task on every row that is not done, as `generate` does."""
    config = prepare(config)
    generate(config)
