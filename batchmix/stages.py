"""The stages before an engine, as every process that has one runs them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

from batchmix.checkpoints.checkpoint import Checkpoint
from batchmix.config import Config
from batchmix.engine.engine import Engine
from batchmix.planning.in_flight import InFlight
from batchmix.planning.planner import Limits, plan
from batchmix.prompts.buffers import Buffers, buffered_bytes
from batchmix.prompts.prompt import PromptBuilder
from batchmix.prompts.tokenizer import Tokenizer, load_tokenizer
from batchmix.records import Batch, InputRow
from batchmix.structured_output.compile import GrammarCompiler, open_grammars


@dataclass(frozen=True)
class Prompts:
    """What makes prompts of rows for one checkpoint."""

    tokenizer: Tokenizer | None
    grammars: GrammarCompiler | None  # None without a tokenizer
    builder: PromptBuilder

    @classmethod
    def open(cls, config: Config, checkpoint: Checkpoint) -> Prompts:
        """BatchmixError where data.template, data.system_prompt or sampling cannot work with this checkpoint."""
        tokenizer = load_tokenizer(checkpoint.folder, config.data.chat_template)
        eos_token_ids = checkpoint.end_tokens(None if tokenizer is None else tokenizer.eos_id)
        return cls.of(
            config, checkpoint, tokenizer, open_grammars(tokenizer, checkpoint.config.vocab_size, eos_token_ids)
        )

    @classmethod
    def of(
        cls, config: Config, checkpoint: Checkpoint, tokenizer: Tokenizer | None, grammars: GrammarCompiler | None
    ) -> Prompts:
        """The same with a tokenizer of the checkpoint, and grammars of its vocabulary, that are there already."""
        builder = PromptBuilder(
            config.data,
            config.sampling,
            tokenizer,
            max_model_len=checkpoint.max_model_len,
            vocab_size=checkpoint.config.vocab_size,
            grammars=grammars,
            eos_token_ids=checkpoint.end_tokens(None if tokenizer is None else tokenizer.eos_id),
        )
        return cls(tokenizer, grammars, builder)


def planned_batches(
    config: Config, keep: Sequence[str], prompts: Prompts, engine: Engine, rows: Iterable[InputRow], in_flight: InFlight
) -> Generator[Batch, None, None]:
    """Rows as batches that fit `engine`, with the columns `keep`; read and tokenised in a thread of their own.

    `in_flight` is to be told of each completion, and holds batches back where too many bytes are on their way.
    """
    buffers, scheduler = buffers_of(config), engine.scheduler
    built = prompts.builder.build(rows, keep=keep, clock=engine.clock, stopping=engine.should_stop, buffers=buffers)
    limits = Limits(
        scheduler.batch.capacity, scheduler.pool.num_blocks, scheduler.block_size, config.engine.sort_window,
        window_bytes=buffers.window, batch_bytes=buffers.batch, share_prefix=scheduler.limits.share_prefix,
    )  # fmt: skip
    with closing(built):
        yield from in_flight.admit(plan(built, limits))


def buffers_of(config: Config) -> Buffers:
    """What each stage of one of the processes that engine.data_parallel_size starts may hold."""
    return Buffers.of(buffered_bytes(config.data.max_buffered_bytes, config.engine.data_parallel_size))
