"""What the run itself and a worker on another machine do alike around the engine."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from typing import Any

from batchmix.config import Config, OnError
from batchmix.data.buffers import Buffers, buffered_bytes
from batchmix.data.parts import PartLog
from batchmix.data.prompt import build_prompts_with_pauses
from batchmix.data.sink import Sink
from batchmix.data.source import Source
from batchmix.data.tokenizer import Tokenizer
from batchmix.engine.engine import Engine
from batchmix.errors import BatchmixError
from batchmix.plan.in_flight import InFlight
from batchmix.plan.planner import Limits, plan
from batchmix.records import Batch, Completion, InputRow
from batchmix.report.clock import StageClock
from batchmix.report.totals import Totals


def planned_batches(
    config: Config,
    keep: Sequence[str],
    tokenizer: Tokenizer | None,
    engine: Engine,
    rows: Iterable[InputRow],
    in_flight: InFlight,
) -> Generator[Batch, None, None]:
    """Rows as batches that fit `engine`, with the columns `keep`; read and tokenised in a thread of their own.

    `in_flight` is to be told of each completion, and holds batches back where too many bytes are on their way.
    """
    buffers = buffers_of(config)
    prompts = build_prompts_with_pauses(
        rows,
        data=config.data,
        sampling=config.sampling,
        tokenizer=tokenizer,
        max_model_len=engine.scheduler.max_model_len,
        vocab_size=engine.model.config.vocab_size,
        keep=keep,
        clock=engine.clock,
        grammars=engine.grammars,
        eos_token_ids=engine.scheduler.batch.eos_token_ids.tolist(),
        stopping=engine.should_stop,
        buffers=buffers,
    )
    scheduler = engine.scheduler
    limits = Limits(
        scheduler.batch.capacity, scheduler.pool.num_blocks, scheduler.block_size, config.engine.sort_window,
        window_bytes=buffers.window, batch_bytes=buffers.batch, share_prefix=scheduler.share_prefix,
    )  # fmt: skip
    with closing(prompts):
        yield from in_flight.admit(plan(prompts, limits))


def buffers_of(config: Config) -> Buffers:
    """What each stage of one of the processes that engine.data_parallel_size starts may hold."""
    return Buffers.of(buffered_bytes(config.data.max_buffered_bytes, config.engine.data_parallel_size))


def check_error(config: Config, completion: Completion) -> None:
    """BatchmixError for a row that cannot be run, where data.on_error=raise."""
    if completion.error is not None and config.data.on_error is OnError["raise"]:
        raise BatchmixError(f"row {completion.prompt.row}: {completion.error} (data.on_error=raise)")


def make_sink(config: Config, log: PartLog, tokenizer: Tokenizer | None, clock: StageClock) -> Sink:
    """The sink that commits parts as `config.output` says."""
    return Sink(
        log,
        tokenizer=tokenizer,
        rows_per_shard=config.output.rows_per_shard,
        flush_seconds=config.output.flush_seconds,
        buffers=buffers_of(config),
        clock=clock,
    )


def progress_of(source: Source, totals: Totals) -> dict[str, Any]:
    """What a heartbeat says: counts since this process began, and rows of the whole data set where known."""
    return {"rows": totals.rows, "error_rows": totals.error_rows, "completion_tokens": totals.completion_tokens,
            "num_rows": source.num_rows}  # fmt: skip
