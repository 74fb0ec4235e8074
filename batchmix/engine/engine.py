"""The engine: batches of prompts in, completions out.

`Engine.generate` is the whole loop: admit prompts into free slots (one packed prefill), decode one token for every
active slot, hand out the rows that ended. Rows never wait for each other: an ended row's slot is refilled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from batchmix.config import SamplingConfig
from batchmix.data.stop_strings import StopTable
from batchmix.engine.admission import admit, worth_refilling
from batchmix.engine.completion import completion
from batchmix.engine.decode import Decode
from batchmix.engine.graphs import Step, StepGraphs
from batchmix.engine.kv_cache import KVCache
from batchmix.engine.prefill import Prefill
from batchmix.engine.restart import start_over
from batchmix.engine.slots import Slots
from batchmix.engine.state import State, Waiting
from batchmix.errors import BatchmixError
from batchmix.model.mixtral import Mixtral
from batchmix.records import Batch, Completion
from batchmix.report.clock import StageClock
from batchmix.report.device_clock import DeviceClock

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
    ) -> None:
        """`steps_per_read`: decode steps between two looks at what they did; more than 1 needs a backend that leaves
        ended rows alone. `capture` makes a CUDA graph of a step."""
        self.model = model
        self.max_model_len = max_model_len
        self.should_stop = should_stop
        self.prefill_chunk = prefill_chunk
        blocks_per_row = -(-max_model_len // cache.block_size)
        if blocks_per_row > cache.num_blocks - 1:
            raise ValueError(f"{cache.num_blocks - 1} KV blocks cannot hold one row of {max_model_len} tokens")
        make_slots = partial(
            Slots,
            vocab_size=model.config.vocab_size,
            blocks_per_row=blocks_per_row,
            eos_token_ids=eos_token_ids,
            stop_table=stop_table,
            device=cache.keys.device,
            row_tile=model.ops.row_tile,
            steps_per_read=steps_per_read,
        )
        make_graphs = partial(StepGraphs, capture)
        self.state = State(cache, max_num_seqs, max_num_batched_tokens, make_slots, make_graphs, share_prefix)
        self.stats = self.state.stats
        self.clock = StageClock()
        self.device_clock = DeviceClock(cache.keys.device)
        self._prefill = Prefill(model, self.state, self.device_clock, max_model_len, prefill_chunk)
        self._decode = Decode(model, self.state, self.device_clock, steps_per_read)

    @torch.inference_mode()
    def generate(self, batches: Iterable[Batch]) -> Iterator[Completion]:
        """Run every prompt of every batch; completions come out as rows end. Stops early when `should_stop()`.

        Under tensor parallelism every rank runs this on the same batches, so nothing here may be decided by a clock.
        """
        state = self.state
        batches = iter(batches)
        more = True
        while not self.should_stop():
            while more and len(state.waiting) < state.slots.capacity:
                batch = next(batches, None)
                more = batch is not None
                if batch is not None:
                    yield from self.enqueue(batch)
            if worth_refilling(state):
                self._attempt("prefill", self.refill)
                yield from self._collect()
            elif state.rows:
                self._attempt("decode", self.decode)
                yield from self._collect()
            elif not more and not state.waiting:
                return

    def enqueue(self, batch: Batch) -> Iterator[Completion]:
        """Let a batch's prompts wait for a slot; those that cannot run come out at once."""
        for prompt in batch.prompts:
            if prompt.error is not None:
                yield Completion.failed(prompt, prompt.error)
            else:
                self.state.waiting.append(Waiting(prompt, list(range(prompt.sampling.n))))
        self.stats.waiting = len(self.state.waiting)

    def refill(self) -> None:
        """Fill free slots with waiting prompts: take their blocks, prefill them packed, choose their first tokens."""
        self.stats.first_prefill_time = self.stats.first_prefill_time or time.time()
        admit(self.state)
        self._prefill.run()
        self._read()
        self.stats.waiting = len(self.state.waiting)

    def decode(self) -> None:
        """A few tokens for every row."""
        self._decode.run()
        self._read()

    def _read(self) -> None:
        self.stats.completion_tokens += self.state.slots.read()
        self.stats.last_token_time = time.time()

    def _attempt(self, name: str, step: Callable[[], None]) -> None:
        """Run one step; where the device has no memory for it, go on with half the batch."""
        try:
            with self.clock.stage(name):
                step()
            self._count_streamed(name)
            return
        except torch.OutOfMemoryError:
            if self.model.shards.size > 1:  # the other ranks know nothing of it
                raise BatchmixError(
                    f"out of memory in a {name} step with {self.state.slots.capacity} rows at once, on one of several"
                    " ranks; lower engine.max_num_seqs or engine.gpu_memory_utilization"
                ) from None
            # What the failed step held is freed with the traceback, so before `start_over`.
        start_over(self.state, name, self.prefill_chunk)

    def _count_streamed(self, name: str) -> None:
        total = self.model.streamed_bytes + self.state.cache.streamed_bytes
        if name == "decode":
            self.stats.decode_streamed_bytes += total - self.stats.streamed_bytes
        self.stats.streamed_bytes = total

    def _collect(self) -> Iterator[Completion]:
        """Hand out the rows that have ended and free their slots, the highest first so that slots below keep theirs."""
        state = self.state
        ended = np.flatnonzero(state.slots.host["finish"][: len(state.rows)])
        completions = [completion(state.rows[slot], state.slots, slot) for slot in ended.tolist()]
        for slot in ended[::-1].tolist():
            state.free(slot)
        if completions:
            mean = sum(done.num_tokens for done in completions) / len(completions)
            state.mean_length = 0.9 * state.mean_length + 0.1 * mean if state.mean_length else mean
        yield from completions
