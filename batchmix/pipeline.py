"""The whole program: source -> prompt -> plan -> engine -> sink."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from batchmix.annotate.columns import annotation_columns
from batchmix.config import Config, OnError
from batchmix.data.columns import OutputColumns
from batchmix.data.output_folder import OutputFolder, trace_path
from batchmix.data.parts import Parts, part_format
from batchmix.data.prompt import build_prompts, check_prompts
from batchmix.data.rowset import RowSet
from batchmix.data.sink import NO_SPACE, Sink
from batchmix.data.source import Source, check_apart, open_source
from batchmix.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint
from batchmix.engine.device import check_places
from batchmix.engine.engine import Engine
from batchmix.engine.start import BLOCK_SIZE, check_engine, open_guides, start_engine
from batchmix.errors import BatchmixError
from batchmix.hydra_app import save_hydra_files
from batchmix.model.checkpoint import Checkpoint, open_checkpoint
from batchmix.model.shards import Shards
from batchmix.parallel.data import Replicas, Reports, Share, begin_share
from batchmix.parallel.tensor import Followers, tensor_parallel
from batchmix.parallel.workers import Parent
from batchmix.plan.cost import Workload, estimate, kv_room
from batchmix.plan.gpus import get_gpu
from batchmix.plan.planner import Limits, plan
from batchmix.plan.report import plan_text
from batchmix.plan.survey import Survey
from batchmix.records import Completion, Row
from batchmix.report.clock import StageClock
from batchmix.report.metrics import Metrics
from batchmix.report.progress import Progress
from batchmix.report.summary import RunStatistics
from batchmix.report.totals import Totals
from batchmix.report.trace import Trace
from batchmix.run_info import describe_run, provenance
from batchmix.signals import StopSignals

_log = logging.getLogger(__name__)
PLANNED_NUM_SEQS = 1024  # rows at once that `batchmix plan` assumes of a GPU whose cache holds more


def generate(config: Config) -> None:
    """Run every row that is not done yet, and commit its completions to `output.dir`.

    BatchmixError for what a user can mend; Interrupted where a signal ended the run early.
    """
    if not config.output.dir:  # an unset shell variable; it would mean the current folder
        raise BatchmixError("output.dir=: give a folder, for example output.dir=out")
    with StopSignals() as signals, _full_disk_in_one_line(config.output.dir):
        check_places(config.engine, config.model.tensor_parallel_size)
        check_apart(config.data, Path(config.output.dir), f"part-00000-000000.{config.output.format.value}")
        source = open_source(config.data, config.shard)
        checkpoint = open_checkpoint(config.model)
        check_engine(checkpoint, config.engine)
        Shards(size=config.model.tensor_parallel_size).check(checkpoint.config)
        tokenizer = load_tokenizer(checkpoint.folder)
        guides = open_guides(checkpoint, tokenizer)
        check_prompts(config.data, config.sampling, tokenizer, checkpoint.config.vocab_size, guides)
        run = _describe(config, source, checkpoint)
        parts = _parts(config, source, checkpoint, tokenizer, run)
        with closing(OutputFolder(config.output, config.shard, parts, run, config.data.limit)) as output:
            if output.complete:
                _log.info("%s is complete, nothing to do", config.output.dir)
                return
            save_hydra_files(config)
            rows = source.rows(output.skip)
            first = next(rows, None)  # before the model is loaded: there may be nothing left to do
            if first is not None:
                output.begin()
                if config.engine.data_parallel_size > 1:
                    statistics = _run_replicas(config, source, run, output, signals)
                else:
                    with tensor_parallel(config, _give_up) as (shards, followers):
                        engine = start_engine(checkpoint, tokenizer, config.engine, signals.stopping, shards, guides)
                        signals.defer()
                        statistics = _run(config, source, tokenizer, output, engine, followers, chain([first], rows))
                signals.raise_if_received()
                output.write_statistics(statistics)
            summary = output.finish()
            print(summary.text() if summary else "this shard is done, others are not")
            print(f"the answers are in {config.output.dir}")


def plan_report(config: Config) -> None:
    """Print what a run would find and cost. Reads and tokenises every row; loads no weights."""
    gpu = get_gpu(config.plan.gpu)
    source = open_source(config.data, config.shard)
    checkpoint = open_checkpoint(config.model, weights=False)
    model, itemsize = checkpoint.config, checkpoint.dtype.itemsize
    rows_at_once = config.engine.max_num_seqs or PLANNED_NUM_SEQS
    _, kv_tokens = kv_room(model, gpu, config.engine.gpu_memory_utilization, checkpoint.max_model_len, itemsize)
    limits = Limits(rows_at_once, kv_tokens // BLOCK_SIZE, BLOCK_SIZE, config.engine.sort_window)
    survey = Survey(naive_batch=rows_at_once)
    tokenizer = load_tokenizer(checkpoint.folder)
    prompts = build_prompts(
        source.rows(RowSet()),
        data=config.data,
        sampling=config.sampling,
        tokenizer=tokenizer,
        max_model_len=checkpoint.max_model_len,
        vocab_size=model.vocab_size,
        keep=[],
        clock=StageClock(),
        guides=open_guides(checkpoint, tokenizer),
    )
    batches = sum(1 for batch in plan(survey.watch(prompts), limits) if batch.prompts[0].error is None)
    answer = config.plan.expected_tokens or config.sampling.max_tokens
    where = (
        "plan.expected_tokens" if config.plan.expected_tokens else "sampling.max_tokens; plan.expected_tokens sets it"
    )
    work = Workload(survey.runnable, survey.prompt_tokens, survey.squared_tokens, survey.samples, answer)
    cost = estimate(
        model,
        gpu,
        work,
        share=config.engine.gpu_memory_utilization,
        max_model_len=checkpoint.max_model_len,
        max_num_seqs=rows_at_once,
        itemsize=itemsize,
    )
    print(plan_text(survey, batches, gpu, work, cost, where))
    picture = config.plan.histogram or (str(Path(config.output.dir, "_lengths.png")) if config.output.dir else None)
    if picture is not None and survey.runnable:
        try:
            Path(picture).parent.mkdir(parents=True, exist_ok=True)
            survey.save_histogram(Path(picture))
        except OSError as error:
            raise BatchmixError(f"plan.histogram={picture}: cannot be written ({error.strerror})") from None
        print(f"histogram: {picture}")


def _run(
    config: Config,
    source: Source,
    tokenizer: Tokenizer | None,
    output: OutputFolder,
    engine: Engine,
    followers: Followers,
    rows: Iterator[Row],
) -> RunStatistics:
    """The run in this process, as its user sees it."""
    clock, stats, started = engine.clock, engine.stats, time.monotonic()
    with (
        _traced(config, engine, output.trace_path),
        closing(_completions(config, source, tokenizer, engine, followers, rows)) as completions,
        Progress(source.shard_rows, output.num_done, stats) as progress,
        Metrics(output.root / "_metrics.jsonl", stats, progress.totals, config.shard.index),
        output.sink(tokenizer, clock) as sink,
    ):
        for completion in completions:
            sink.write(completion)
            progress.count(completion)
        device_seconds = engine.device_clock.seconds()
        stats.expert_tokens = engine.model.expert_load.counts.tolist()
    return RunStatistics(progress.totals, stats, clock, time.monotonic() - started, device_seconds)


def _completions(
    config: Config,
    source: Source,
    tokenizer: Tokenizer | None,
    engine: Engine,
    followers: Followers,
    rows: Iterator[Row],
) -> Generator[Completion, None, None]:
    """The chain of stages up to the engine; every stage but that works in a thread of its own."""
    prompts = build_prompts(
        rows,
        data=config.data,
        sampling=config.sampling,
        tokenizer=tokenizer,
        max_model_len=engine.max_model_len,
        vocab_size=engine.model.config.vocab_size,
        keep=source.schema.names,
        clock=engine.clock,
        guides=engine.guides,
    )
    state = engine.state
    limits = Limits(
        state.slots.capacity, state.pool.num_blocks, state.cache.block_size, config.engine.sort_window,
        share_prefix=state.prefixes is not None,
    )  # fmt: skip
    with closing(prompts):
        for completion in engine.generate(followers.lead(plan(prompts, limits))):
            if completion.error is not None and config.data.on_error is OnError["raise"]:
                raise BatchmixError(f"row {completion.prompt.row}: {completion.error} (data.on_error=raise)")
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
        Metrics(output.root / "_metrics.jsonl", replicas.stats, progress.totals, config.shard.index),
    ):
        replicas.run(signals, progress.totals, clock)
    seconds = time.monotonic() - started
    return RunStatistics(progress.totals, replicas.stats, clock, seconds, replicas.device_seconds)


def _work(parent: Parent, config: Config, share: Share) -> None:
    """One worker of `_run_replicas`: the whole chain of stages on its share of the rows."""
    with StopSignals() as signals, _full_disk_in_one_line(config.output.dir):
        begin_share(parent, share)
        source = open_source(config.data, share.shard)
        rows = source.rows(share.skip)
        first = next(rows, None)
        if first is None:
            return
        checkpoint = open_checkpoint(config.model)
        tokenizer = load_tokenizer(checkpoint.folder)
        with tensor_parallel(config, parent.send) as (shards, followers):
            engine = start_engine(checkpoint, tokenizer, config.engine, signals.stopping, shards)
            signals.defer()
            totals = Totals()
            with (
                _traced(config, engine, trace_path(Path(config.output.dir), share.shard)),
                closing(
                    _completions(config, source, tokenizer, engine, followers, chain([first], rows))
                ) as completions,
                Reports(parent, engine.stats, totals, engine.clock) as reports,
                Sink(
                    _parts(config, source, checkpoint, tokenizer, share.run),
                    share.folder,
                    share.shard.index,
                    tokenizer=tokenizer,
                    rows_per_shard=config.output.rows_per_shard,
                    flush_seconds=config.output.flush_seconds,
                    clock=engine.clock,
                ) as sink,
            ):
                for completion in completions:
                    sink.write(completion)
                    totals.count(completion)
                reports.device_seconds = engine.device_clock.seconds()
                engine.stats.expert_tokens = engine.model.expert_load.counts.tolist()
        signals.raise_if_received()


@contextmanager
def _traced(config: Config, engine: Engine, path: Path) -> Iterator[None]:
    """With engine.trace, what all threads and the device do goes to `path`."""
    if not config.engine.trace:
        yield
        return
    with Trace(path) as trace:
        engine.clock.trace = engine.device_clock.trace = trace
        yield


def _give_up(error: BatchmixError) -> None:
    """The last words of a process that hangs and will be ended."""
    print(f"batchmix: error: {error}", file=sys.stderr, flush=True)


def _describe(config: Config, source: Source, checkpoint: Checkpoint) -> dict[str, Any]:
    return describe_run(
        config,
        model=checkpoint.fingerprint(),
        tokenizer=tokenizer_fingerprint(checkpoint.folder),
        data=source.fingerprint(),
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        max_model_len=checkpoint.max_model_len,
    )


def _parts(
    config: Config, source: Source, checkpoint: Checkpoint, tokenizer: Tokenizer | None, run: dict[str, Any]
) -> Parts:
    columns = OutputColumns(
        source.schema,
        token_ids=config.output.token_ids or tokenizer is None,
        logprobs=config.sampling.logprobs is not None,
        provenance=provenance(run),
        annotations=annotation_columns(config.annotate),
    )
    if source.openai_batch and config.annotate.input is not None:
        raise BatchmixError("data.format=openai_batch: its requests are prompts already; annotate rows with columns")
    model = checkpoint.folder.name if source.openai_batch else None
    form = part_format(config.output.format, columns, config.output.compression, model)
    return Parts(Path(config.output.dir), form)


@contextmanager
def _full_disk_in_one_line(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise BatchmixError(
            f"output.dir={folder}: {error.strerror}; what was committed is safe, make room and run the command again"
        ) from None
