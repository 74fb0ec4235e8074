"""The whole program: source -> prompts -> plan -> engine -> sink."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import chain
from typing import Any

from batchmix.config import Config
from batchmix.distributed.config import ClusterKind
from batchmix.distributed.executor import Executor, LocalExecutor
from batchmix.distributed.process_pool import ProcessPool
from batchmix.distributed.ray_pool import RayPool
from batchmix.errors import BatchmixError
from batchmix.hydra_app import save_hydra_files
from batchmix.input.config import OnError
from batchmix.input.source import Source
from batchmix.observability.first_rows import FirstRows
from batchmix.observability.metrics import Metrics
from batchmix.observability.progress import Progress
from batchmix.observability.summary import RunStatistics
from batchmix.observability.totals import Totals
from batchmix.observability.tracking import Trackers
from batchmix.output.finalize import check_errors
from batchmix.output.run_info import accept_weights, flatten
from batchmix.output.sink import Sink
from batchmix.output.store_errors import output_errors_in_one_line
from batchmix.preflight import Run, open_run
from batchmix.records import InputRow
from batchmix.signals import StopSignals
from batchmix.stages import buffers_of

# Groups of settings that trackers show.
_TRACKED = frozenset("model data sampling engine output shard cluster annotate".split())
_log = logging.getLogger(__name__)


def generate(config: Config) -> None:
    """Run every row that is not done yet, and commit its completions to `output.dir`.

    BatchmixError for what a user can mend, of these TooManyErrors once all rows are there; Interrupted where a signal ended
    the run early.
    """
    if not config.output.dir:  # an unset shell variable; it would mean the current folder
        raise BatchmixError("output.dir=: give a folder, for example output.dir=out")
    with StopSignals() as signals, output_errors_in_one_line(config.output.dir), open_run(config) as run:
        source, output = run.source, run.output
        if output.complete:
            _log.info("%s is complete, nothing to do", config.output.dir)
            return
        save_hydra_files(run.config, output.storage)
        rows = run.prompts.builder.show_first(source.rows(output.skip))
        first = next(rows, None)  # before the model is loaded: there may be nothing left to do
        if first is not None:
            output.begin()
            output.write_statistics(_execute(run, signals, chain([first], rows)))
        assert source.num_rows is not None  # all have been read
        run.check_unchanged()
        summary = output.finish(source.num_rows)
        if summary is not None:
            print(summary.text())
        else:
            print(f"this shard is done, {'so are all others' if output.complete else 'others are not'}")
        print(f"the answers are in {output.storage.url}")
        check_errors(output.storage)


def _execute(run: Run, signals: StopSignals, rows: Iterator[InputRow]) -> RunStatistics:
    """The rows' way through the engine into the sink, as its user sees it. Interrupted where a signal ended it early."""
    config, source, output = run.config, run.source, run.output
    with _trackers(run) as trackers, _executor(run, signals) as executor:
        signals.defer()
        started = time.monotonic()
        with (
            Progress(source.shard_rows, output.num_done, executor.stats) as progress,
            Metrics(output.storage, executor.stats, progress.totals, config.shard.index, trackers),
            _sink(run, executor) as sink,
            closing(executor.run(rows)) as completions,
        ):
            output.report(partial(_progress_of, source, progress.totals))
            first_rows = FirstRows()
            for completion in completions:
                if completion.error is not None and config.data.on_error is OnError["raise"]:
                    raise BatchmixError(f"row {completion.prompt.row}: {completion.error} (data.on_error=raise)")
                sink.write(completion)
                progress.count(completion)
                first_rows.count(completion)
            device_seconds = executor.device_seconds
        seconds = time.monotonic() - started
    signals.raise_if_received()
    return RunStatistics(progress.totals, executor.stats, executor.clock, seconds, device_seconds)


def _trackers(run: Run) -> Trackers:
    """What `output.report_to` and `output.prometheus_file` name."""
    output, shard = run.config.output, run.config.shard
    identity, written = run.description["identity"], run.description["config"]
    shown = {key: value for key, value in flatten(written) if key.partition(".")[0] in _TRACKED}
    place = run.output.storage.url
    return Trackers(output.report_to, output.prometheus_file, place, (shard.index, shard.count), identity, shown)


def _executor(run: Run, signals: StopSignals) -> Executor:
    """What `cluster.kind` and `engine.data_parallel_size` ask for."""
    config, output = run.config, run.output
    keep = run.source.schema.names
    accept = partial(accept_weights, output.storage)
    if config.cluster.kind is ClusterKind.ray or config.engine.data_parallel_size > 1:
        pool = RayPool if config.cluster.kind is ClusterKind.ray else ProcessPool
        return pool(config, run.checkpoint.fingerprint(), keep, signals.stopping, accept)
    return LocalExecutor(config, run.checkpoint, run.prompts, keep, signals.stopping, accept, output.trace_name)


def _sink(run: Run, executor: Executor) -> Sink:
    config = run.config
    return Sink(
        run.output.log(run.source.new_extents),
        tokenizer=run.prompts.tokenizer,
        rows_per_shard=config.output.rows_per_shard,
        flush_seconds=config.output.flush_seconds,
        buffers=buffers_of(config),
        clock=executor.clock,
    )


def _progress_of(source: Source, totals: Totals) -> dict[str, Any]:
    """What a heartbeat says: counts since this process began, and rows of the whole data set where known."""
    return {"rows": totals.rows, "error_rows": totals.error_rows, "completion_tokens": totals.completion_tokens,
            "num_rows": source.num_rows}  # fmt: skip
