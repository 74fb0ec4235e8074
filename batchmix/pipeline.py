"""The whole program: source -> prompt -> plan -> engine -> sink."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain
from typing import Any

from batchmix.annotate.columns import annotation_columns
from batchmix.checkpoints.checkpoint import Checkpoint, open_checkpoint
from batchmix.config import ClusterKind, Config
from batchmix.distributed.data_parallel import Replicas, Reports, Share, begin_share
from batchmix.distributed.ray_pool import run_on_ray
from batchmix.distributed.tensor_parallel import TPWorkers, tensor_parallel
from batchmix.distributed.workers import Parent
from batchmix.engine.build import check_engine, start_engine
from batchmix.engine.device import check_places
from batchmix.engine.engine import Engine
from batchmix.errors import BatchmixError
from batchmix.hydra_app import save_hydra_files
from batchmix.input.source import Source, check_apart, open_source
from batchmix.models.tensor_parallel import TensorParallel
from batchmix.observability.clock import StageClock
from batchmix.observability.metrics import Metrics
from batchmix.observability.progress import Progress
from batchmix.observability.summary import RunStatistics
from batchmix.observability.totals import Totals
from batchmix.observability.trace import Trace
from batchmix.output.all_failed import check_not_all_failed
from batchmix.output.columns import OutputColumns
from batchmix.output.output_folder import OutputFolder, trace_name
from batchmix.output.part_formats import part_format
from batchmix.output.parts import PartLog, Parts
from batchmix.output.run_info import accept_weights, describe_run, differences, provenance, read_run
from batchmix.output.sink import NO_SPACE
from batchmix.planning.in_flight import InFlight
from batchmix.prompts.escapes import warn_of_escapes
from batchmix.prompts.prompt import check_prompts, show_first
from batchmix.prompts.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint
from batchmix.records import Completion, InputRow
from batchmix.signals import StopSignals
from batchmix.stages import buffers_of, check_error, make_sink, planned_batches, progress_of
from batchmix.storage import Storage, open_storage, reason_of
from batchmix.structured_output.compile import open_grammars
from batchmix.templates.chat_template import read_chat_template

_log = logging.getLogger(__name__)


def generate(config: Config) -> None:
    """Run every row that is not done yet, and commit its completions to `output.dir`.

    BatchmixError for what a user can mend, of these AllRowsFailed once the run is complete; Interrupted where a signal ended the run early.
    """
    config = read_chat_template(config)
    if not config.output.dir:  # an unset shell variable; it would mean the current folder
        raise BatchmixError("output.dir=: give a folder, for example output.dir=out")
    with StopSignals() as signals, _output_errors_in_one_line(config.output.dir):
        on_ray = config.cluster.kind is ClusterKind.ray
        if not on_ray:  # whose nodes are not this machine
            check_places(config.engine, config.model.tensor_parallel_size)
        check_apart(config.data, config.output.dir, f"part-00000-000000.{config.output.format.value}")
        source = open_source(config.data, config.shard)
        checkpoint = open_checkpoint(config.model)
        for note in checkpoint.notes:
            _log.warning("%s", note)
        if not on_ray:
            check_engine(checkpoint, config.engine)
        TensorParallel(size=config.model.tensor_parallel_size).check(checkpoint.config, checkpoint.quantization)
        tokenizer = load_tokenizer(checkpoint.folder, config.data.chat_template)
        end_tokens = checkpoint.end_tokens(None if tokenizer is None else tokenizer.eos_id)
        grammars = open_grammars(tokenizer, checkpoint.config.vocab_size, end_tokens)
        check_prompts(config.data, config.sampling, tokenizer, checkpoint.config.vocab_size, grammars, end_tokens)
        warn_of_escapes(config)
        run = _describe(config, source, checkpoint)
        parts = _parts(config, source, checkpoint, tokenizer, run)
        num_workers = config.engine.data_parallel_size
        with closing(OutputFolder(config.output, config.shard, parts, run, config.data.limit, num_workers)) as output:
            _check_data(source, output)
            if output.complete:
                _log.info("%s is complete, nothing to do", config.output.dir)
                check_not_all_failed(parts)
                return
            save_hydra_files(config, output.storage)
            rows = show_first(
                source.rows(output.skip),
                data=config.data,
                sampling=config.sampling,
                tokenizer=tokenizer,
                max_model_len=checkpoint.max_model_len,
                vocab_size=checkpoint.config.vocab_size,
                grammars=grammars,
                eos_token_ids=end_tokens,
            )
            first = next(rows, None)  # before the model is loaded: there may be nothing left to do
            if first is not None:
                output.begin()
                if on_ray:
                    statistics = run_on_ray(
                        config, source, checkpoint, tokenizer, output, signals, chain([first], rows)
                    )
                elif num_workers > 1:
                    statistics = _run_replicas(config, source, run, output, signals)
                else:
                    with tensor_parallel(config, _give_up) as (tp, tp_workers):
                        engine = start_engine(checkpoint, tokenizer, config.engine, signals.stopping, tp, grammars)
                        signals.defer()
                        accept_weights(output.storage, engine.model.weights.fingerprint)
                        statistics = _run(config, source, tokenizer, output, engine, tp_workers, chain([first], rows))
                signals.raise_if_received()
                output.write_statistics(statistics)
            assert source.num_rows is not None  # all have been read
            _check_unchanged(source, output, run)
            summary = output.finish(source.num_rows)
            others = "so are all others" if output.complete else "others are not"
            print(summary.text() if summary else f"this shard is done, {others}")
            print(f"the answers are in {output.storage.url}")
            if summary is not None or output.complete:  # else other shards have rows left
                check_not_all_failed(parts)


def _run(
    config: Config,
    source: Source,
    tokenizer: Tokenizer | None,
    output: OutputFolder,
    engine: Engine,
    tp_workers: TPWorkers,
    rows: Iterator[InputRow],
) -> RunStatistics:
    """The run in this process, as its user sees it."""
    clock, stats, started = engine.clock, engine.stats, time.monotonic()
    with (
        _traced(config, engine, output.storage, output.trace_name),
        closing(_completions(config, source, tokenizer, engine, tp_workers, rows)) as completions,
        Progress(source.shard_rows, output.num_done, stats) as progress,
        Metrics(output.storage, stats, progress.totals, config.shard.index),
        make_sink(config, output.log(source.new_extents), tokenizer, clock) as sink,
    ):
        output.report(partial(progress_of, source, progress.totals))
        for completion in completions:
            sink.write(completion)
            progress.count(completion)
        device_seconds = engine.read_totals()
    return RunStatistics(progress.totals, stats, clock, time.monotonic() - started, device_seconds)


def _completions(
    config: Config,
    source: Source,
    tokenizer: Tokenizer | None,
    engine: Engine,
    tp_workers: TPWorkers,
    rows: Iterator[InputRow],
) -> Generator[Completion, None, None]:
    """The chain of stages up to the engine; every stage but that works in a thread of its own."""
    in_flight = InFlight(buffers_of(config).in_flight)
    with closing(planned_batches(config, source.schema.names, tokenizer, engine, rows, in_flight)) as batches:
        for completion in engine.generate(tp_workers.broadcast(batches)):
            in_flight.completed(completion)
            check_error(config, completion)
            yield completion


def _run_replicas(
    config: Config, source: Source, run: dict[str, Any], output: OutputFolder, signals: StopSignals
) -> RunStatistics:
    """The run in `engine.data_parallel_size` workers, as its user sees it."""
    clock, started = StageClock(), time.monotonic()
    signals.defer()
    with (
        Replicas(_work, config, run, output) as replicas,
        Progress(source.shard_rows, output.num_done, replicas.stats) as progress,
        Metrics(output.storage, replicas.stats, progress.totals, config.shard.index),
    ):
        output.report(partial(progress_of, source, progress.totals))
        replicas.run(signals, progress.totals, clock)
        source.num_rows = replicas.num_rows if source.num_rows is None else source.num_rows
    seconds = time.monotonic() - started
    return RunStatistics(progress.totals, replicas.stats, clock, seconds, replicas.device_seconds)


def _work(parent: Parent, config: Config, share: Share) -> None:
    """One worker of `_run_replicas`: the whole chain of stages on its share of the rows."""
    with StopSignals() as signals, _output_errors_in_one_line(config.output.dir):
        begin_share(parent, share)
        source = open_source(config.data, share.shard)
        rows = source.rows(share.skip)
        first = next(rows, None)
        if first is None:
            return
        checkpoint = open_checkpoint(config.model)
        tokenizer = load_tokenizer(checkpoint.folder, config.data.chat_template)
        with tensor_parallel(config, parent.send) as (tp, tp_workers):
            engine = start_engine(checkpoint, tokenizer, config.engine, signals.stopping, tp)
            signals.defer()
            totals = Totals()
            storage = open_storage(config.output.dir)
            accept_weights(storage, engine.model.weights.fingerprint)
            parts = _parts(config, source, checkpoint, tokenizer, share.run)
            log = PartLog(parts, share.folder, share.shard.index, share.first_number, lambda: None, source.new_extents)
            with (
                _traced(config, engine, storage, trace_name(share.shard)),
                closing(
                    _completions(config, source, tokenizer, engine, tp_workers, chain([first], rows))
                ) as completions,
                Reports(parent, engine.stats, totals, engine.clock) as reports,
                make_sink(config, log, tokenizer, engine.clock) as sink,
            ):
                for completion in completions:
                    sink.write(completion)
                    totals.count(completion)
                reports.device_seconds = engine.read_totals()
                reports.num_rows = source.num_rows
        signals.raise_if_received()


@contextmanager
def _traced(config: Config, engine: Engine, storage: Storage, name: str) -> Iterator[None]:
    """With engine.trace, what all threads and the device do goes to the file `name`."""
    if not config.engine.trace:
        yield
        return
    with storage.local_file(name) as path, Trace(path) as trace:
        engine.clock.trace = engine.device_clock.trace = trace
        yield


def _give_up(error: BatchmixError) -> None:
    """The last words of a process that hangs and will be ended."""
    print(f"batchmix: error: {error}", file=sys.stderr, flush=True)


def _describe(config: Config, source: Source, checkpoint: Checkpoint) -> dict[str, Any]:
    run = describe_run(
        config,
        openai_model=checkpoint.folder.name if source.openai_batch else None,
        model=checkpoint.fingerprint(),
        tokenizer=tokenizer_fingerprint(checkpoint.folder),
        data=source.fingerprint(),
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        quantization=None if checkpoint.quantization is None else checkpoint.quantization.value,
        max_model_len=checkpoint.max_model_len,
    )
    return run | {"data_versions": source.versions()}


def _check_data(source: Source, output: OutputFolder) -> None:
    """BatchmixError where what was read for the rows there has other bytes now."""
    change = source.find_change(output.extents(), read_run(output.storage).get("data_versions"))
    if change is not None:
        raise BatchmixError(f"output.dir={output.storage.url} holds rows made with other settings (data: {change}); choose "
                            "another output.dir, or set output.overwrite=true to delete them and start afresh")  # fmt: skip


def _check_unchanged(source: Source, output: OutputFolder, run: dict[str, Any]) -> None:
    """BatchmixError where a file was written to while it was read."""
    changed = differences({"data": run["identity"]["data"]}, {"data": source.fingerprint()})
    if not changed and source.versions() != run["data_versions"]:
        changed = [f"data: {change}"] if (change := source.find_change(output.extents(), None)) else []
    if changed:
        raise BatchmixError(f"{'; '.join(changed)} while it was read, so output.dir={output.storage.url} may hold answers to "
                            "either; put back what it was and run the command again, or set output.overwrite=true to start "
                            "afresh once nobody writes to it")  # fmt: skip


def _parts(
    config: Config, source: Source, checkpoint: Checkpoint, tokenizer: Tokenizer | None, run: dict[str, Any]
) -> Parts:
    structured = config.sampling.structured_outputs
    columns = OutputColumns(
        source.schema,
        token_ids=config.output.token_ids or tokenizer is None,
        logprobs=config.sampling.logprobs is not None,
        choice_probabilities=structured is not None and structured.score_choices,
        guided_logprobs=structured is not None and structured.token_probabilities and config.annotate.input is None,
        provenance=provenance(run),
        annotations=annotation_columns(config.annotate),
    )
    if source.openai_batch and config.annotate.input is not None:
        raise BatchmixError("data.format=openai_batch: its requests are prompts already; annotate rows with columns")
    form = part_format(config.output.format, columns, config.output.compression, run["openai_model"])
    return Parts(open_storage(config.output.dir), form)


@contextmanager
def _output_errors_in_one_line(folder: str) -> Iterator[None]:
    """BatchmixError where the disk is full, the output folder was deleted, or its store does not answer any more."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise BatchmixError(
                f"output.dir={folder}: {error.strerror}; what was committed is safe, make room and run the command again"
            ) from None
        local = folder.removeprefix("file://")
        if "://" not in local:
            if not str(error.filename).startswith(os.path.join(local, "")) and error.filename != local:
                raise  # not of the output
            gone = not os.path.isdir(local)
            reason = "was deleted while the run wrote to it" if gone else f"{error.filename}: {error.strerror}"
        else:  # input has errors of its own, see `batchmix.input.data_file.reading`
            reason = f"the store fails ({reason_of(error)})"
        raise BatchmixError(f"output.dir={folder}: {reason}; what is committed there is whole, run the command again for the "
                            "rest") from None  # fmt: skip
