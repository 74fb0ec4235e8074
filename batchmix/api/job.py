"""`batchmix.run`: a whole job from Python, with all that it does on the command line."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from hydra._internal.grammar.utils import escape_special_characters
from hydra.core.override_parser.types import Override, Quote, QuotedString

from batchmix.annotate.results import Results
from batchmix.annotation import annotate
from batchmix.config import Config
from batchmix.errors import BatchmixError, Interrupted
from batchmix.hydra_app import EXIT_REQUEUE, composed_job
from batchmix.pipeline import generate
from batchmix.signals import no_exit
from batchmix.storage import read_json
from batchmix.storage.bookkeeping import SUMMARY

_JOBS: Mapping[str, Callable[[Config], None]] = {"annotate": annotate, "generate": generate}


class Run:
    """A job that has ended, and what it has written to `output_dir`."""

    def __init__(self, output_dir: str) -> None:
        self.output_dir = output_dir

    @property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` says: counts, error rows by reason, seconds. BatchmixError while shards are missing."""
        storage = Results(self.output_dir).storage
        try:
            found: dict[str, Any] = read_json(storage, SUMMARY)
        except FileNotFoundError:
            raise BatchmixError(f"output.dir={self.output_dir}: rows are left, so there is no summary") from None
        return found

    def table(self) -> pa.Table:
        """All rows with their samples, in the order of the input."""
        tables = list(Results(self.output_dir).batches(samples=True))
        return pa.concat_tables(tables).sort_by([("row", "ascending"), ("sample_index", "ascending")])

    def to_pandas(self) -> Any:
        """The same as a pandas DataFrame."""
        return self.table().to_pandas()

    def __repr__(self) -> str:
        return f"Run({self.output_dir!r})"


def run(job: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Run:
    """Run `batchmix generate` or `annotate` here, and return what it has written. Run again, it finishes what is left.

    `overrides`: as on the command line, `["data.path=prompts.jsonl", "output.dir=out"]`, or a mapping of keys to Python
    values. BatchmixError for what ends the command with exit code 1. KeyboardInterrupt on Ctrl-C, once what is finished is
    committed; other signals that stop a job raise SystemExit. Hydra's global state stays as it is.
    """
    if job not in _JOBS:
        raise BatchmixError(
            f"batchmix.run: {job!r} is not among {', '.join(_JOBS)}; use the command line: batchmix {job} ..."
        )
    if isinstance(overrides, str):
        raise TypeError("overrides must be a list of texts or a mapping, not one text")
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={_written(value)}" for key, value in overrides.items()]
    with composed_job(job, overrides) as config, no_exit():
        try:
            _JOBS[job](config)
        except Interrupted as interrupted:
            if str(interrupted) == signal.SIGINT.name:
                raise KeyboardInterrupt from None
            raise SystemExit(EXIT_REQUEUE) from None
        return Run(config.output.dir)


def _written(value: Any) -> str:
    """A Python value as an override has it."""
    return str(Override._get_value_element_as_str(_quoted(value)))


def _quoted(value: Any) -> Any:
    """The same with its texts quoted, so that none is read as anything else."""
    if isinstance(value, Mapping):
        return {escape_special_characters(str(key)): _quoted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_quoted(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return QuotedString(str(value), Quote.single)
