"""The engine: batches of prompts in, completions out.

`Engine.generate` is the whole loop: admit prompts into free slots (one packed prefill), or decode a few tokens for every
active slot; then see what is known of the steps before and hand out the rows that ended. Rows never wait for each other:
an ended row's slot is refilled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from batchmix.config import SamplingConfig
from batchmix.data.stop_strings import StopTable
from batchmix.engine.admission import admit, worth_refilling
from batchmix.engine.async_copy import AsyncCopy, async_copy_from
from batchmix.engine.choices import Choices
from batchmix.engine.completion import hear
from batchmix.engine.decode import Decode
from batchmix.engine.graphs import Step, StepGraphs
from batchmix.engine.kv_cache import KVCache
from batchmix.engine.prefill import Prefill
from batchmix.engine.restart import retry_with_half_the_batch
from batchmix.engine.slots import InputBatch
from batchmix.engine.state import State, Waiting
from batchmix.errors import BatchmixError
from batchmix.guided.compile import GrammarCompiler
from batchmix.model.mixtral import Mixtral
from batchmix.plan.cost import full_step
from batchmix.records import Batch, Completion
from batchmix.report.clock import StageClock
from batchmix.report.device_clock import DeviceClock

if TYPE_CHECKING:
    from batchmix.engine.compile_ahead import CompileClock

_log = logging.getLogger(__name__)
PREFILL_CHUNK = 2048  # longer prompts are cut at multiples of it, so that where they are cut depends on them alone


class Engine:
    """Runs prompts through the model, `max_num_seqs` rows at a time."""

    def __init__(
        self,
        model: Mixtral,
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        stop_table: Callable[[SamplingConfig], StopTable] | None,
        should_stop: Callable[[], bool] = lambda: False,
        prefill_chunk: int = PREFILL_CHUNK,
        steps_per_read: int = 1,
        capture: Callable[[Step], Step] | None = None,
        share_prefix: bool = False,
        async_copy: AsyncCopy | None = None,
        grammars: GrammarCompiler | None = None,
        compile_clock: CompileClock | None = None,
    ) -> None:
        """`steps_per_read`: decode steps between two looks at what they did. `capture` makes a CUDA graph of a step.
        `async_copy`, to the cache's device, says when results are looked at."""
        self.model = model
        self.grammars = grammars
        self.compile_clock = compile_clock
        self.max_model_len = max_model_len
        self.should_stop = should_stop
        self.prefill_chunk = prefill_chunk
        blocks_per_row = -(-max_model_len // cache.block_size)
        if blocks_per_row > cache.num_blocks - 1:
            raise ValueError(f"{cache.num_blocks - 1} KV blocks cannot hold one row of {max_model_len} tokens")
        make_slots = partial(
            InputBatch,
            vocab_size=model.config.vocab_size,
            blocks_per_row=blocks_per_row,
            eos_token_ids=eos_token_ids,
            stop_table=stop_table,
            async_copy=async_copy or async_copy_from(cache.keys.device),
            row_tile=model.ops.row_tile,
            steps_per_read=steps_per_read,
            grammars=grammars,
        )
        make_graphs = partial(StepGraphs, capture)
        model.expert_load.reset()
        # Tokens from which a prefill step takes longer to compute than its weights to come, which streamed ones take long for.
        full = full_step(model.config) if model.stream is None else max_num_batched_tokens
        self.state = State(cache, max_num_seqs, max_num_batched_tokens, full, make_slots, make_graphs, share_prefix)
        self.stats = self.state.stats
        self.clock = StageClock()
        self.device_clock = DeviceClock(cache.keys.device)
        self.prefill = Prefill(model, self.state, self.device_clock, max_model_len, prefill_chunk)
        self.choices = Choices(model, self.state, self.device_clock, prefill_chunk, grammars)
        self.decode = Decode(model, self.state, self.device_clock, steps_per_read)

    @torch.inference_mode()
    def generate(self, batches: Iterable[Batch]) -> Iterator[Completion]:
        """Run every prompt of every batch; completions come out as rows end. Stops early when `should_stop()`.

        Under tensor parallelism every rank runs this on the same batches, so nothing here may be decided by a clock.
        """
        state = self.state
        batches = iter(batches)
        more = True
        while not self.should_stop():
            while more and len(state.waiting) + len(self.choices.waiting) < state.slots.capacity:
                batch = next(batches, None)
                more = batch is not None
                if batch is None:
                    continue
                if not batch.prompts:  # there are more, but those on their way take all the memory that they may
                    break
                yield from self.enqueue(batch)
            if self.choices.ready():
                self._attempt("prefill", self.choices.run)
            elif worth_refilling(state) and admit(state):
                self._attempt("prefill", self.prefill.run)
            elif state.rows:
                self._attempt("decode", self.decode.run)
            elif not more and not state.waiting and not self.choices.waiting:
                return
            yield from self._completed()
        hear(state, all_of_it=True)
        yield from self._completed()

    def enqueue(self, batch: Batch) -> Iterator[Completion]:
        """Let a batch's prompts wait for a slot; those that cannot run come out at once."""
        for prompt in batch.prompts:
            if prompt.error is not None:
                yield Completion.failed(prompt, prompt.error)
            elif prompt.sampling.structured_outputs is not None and prompt.sampling.structured_outputs.score_choices:
                self.choices.waiting.append(prompt)
            else:
                self.state.waiting.append(Waiting(prompt, list(prompt.samples or range(prompt.sampling.n))))
        self.stats.waiting = len(self.state.waiting)

    def _attempt(self, name: str, step: Callable[[], None]) -> None:
        """Queue steps and see what those before them did; where the device has no memory, go on with half the batch."""
        try:
            with self.clock.stage(name):
                step()
                hear(self.state, all_of_it=False)
            self._count_streamed(name)
            return
        except torch.OutOfMemoryError:
            if self.model.tp.size > 1:  # the other ranks know nothing of it
                raise BatchmixError(
                    f"out of memory in a {name} step with {self.state.slots.capacity} rows at once, on one of several"
                    " ranks; lower engine.max_num_seqs or engine.gpu_memory_utilization"
                ) from None
            # What the failed step held is freed with the traceback, so before `retry_with_half_the_batch`.
        retry_with_half_the_batch(self.state, name, self.prefill_chunk)

    def read_totals(self) -> float | None:
        """Wait for the device and read the totals that it keeps into `stats`. The seconds that it worked; None on a CPU."""
        seconds, stats = self.device_clock.seconds(), self.stats
        stats.expert_tokens = self.model.expert_load.counts.tolist()
        stats.decode_steps = self.device_clock.steps()
        if self.compile_clock is not None:
            stats.kernels_compiled, stats.compile_seconds = self.compile_clock.kernels, self.compile_clock.seconds
        if stats.decode_steps:
            sizes = ", ".join(
                f"{size}: {count:,.0f} of {took / count * 1e3:.1f} ms"
                for size, (count, took) in stats.decode_steps.items()
            )
            _log.info(
                "decode steps by captured size: %s; %d graphs captured in %.1f s, %d kernels compiled in %.1f s during the run",
                sizes, stats.graphs_captured, stats.capture_seconds, stats.kernels_compiled, stats.compile_seconds,
            )  # fmt: skip
        return seconds

    def _completed(self) -> Iterator[Completion]:
        completed, self.state.completed = self.state.completed, []
        yield from completed

    def _count_streamed(self, name: str) -> None:
        total = self.model.streamed_bytes + self.state.cache.streamed_bytes
        if name == "decode":
            self.stats.decode_streamed_bytes += total - self.stats.streamed_bytes
        self.stats.streamed_bytes = total
