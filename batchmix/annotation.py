"""`batchmix annotate`: the run of a task, then its checks and its report."""

from __future__ import annotations

import logging

from batchmix.annotate.checks import check_fields, checks_text, write_checks
from batchmix.annotate.page import write_report
from batchmix.annotate.results import Results
from batchmix.annotate.task import answer_of, prepare
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.input.source import open_source
from batchmix.output.error_rows import TooManyErrors
from batchmix.pipeline import generate

_TINY_FIELDS = {"sentiment", "topic", "urgent"}  # of conf/annotate/tickets.yaml
_log = logging.getLogger(__name__)


def annotate(config: Config) -> None:
    """Run the task on every row that is not done, as `generate` does; what is the last to end writes checks and report.

    TooManyErrors, as `generate`, once these are written.
    """
    config = prepare(config)
    _check_gold(config)
    answer = answer_of(config.annotate)
    if config.model.path == "tiny" and answer is not None and {field.name for field in answer.fields} != _TINY_FIELDS:
        _log.warning("model.path=tiny: the built-in model can do the task `tickets` alone, so these answers will mean nothing;"
                     " give a real model")  # fmt: skip
    try:
        generate(config)
    except TooManyErrors:
        _write_report(config)  # which shows the rows' errors
        raise
    _write_report(config)


def _write_report(config: Config) -> None:
    """Checks and report, of a run that is complete."""
    results = Results(config.output.dir)
    if not results.complete or not results.names:
        return
    checks = write_checks(results, config.annotate.gold, config.annotate.bootstrap)
    print(checks_text(checks))
    print(f"the report is {write_report(results, config.annotate, checks)}")


def _check_gold(config: Config) -> None:
    """A gold column or a field that is not there is better known before the run than after it."""
    gold = config.annotate.gold
    if gold is None:
        return
    answer = answer_of(config.annotate)
    if isinstance(gold, dict) and answer is not None:
        check_fields(gold, answer.fields)
    kept = open_source(config.data, config.shard).schema.names
    for name in gold.values() if isinstance(gold, dict) else [gold]:
        if name not in kept:
            raise BatchmixError(f"annotate.gold={gold}: the output keeps no column {name!r}; it has {', '.join(kept)}")
