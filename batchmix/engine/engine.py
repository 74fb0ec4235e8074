"""The engine: batches of prompts in, completions out.

`Engine.generate` is the whole loop: admit prompts into free slots (one packed prefill), decode one token for every
active slot, hand out the rows that ended. Rows never wait for each other: an ended row's slot is refilled.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from batchmix.config import SamplingConfig
from batchmix.data.stop_strings import StopTable
from batchmix.engine.graphs import Step, StepGraphs, ladder, rung
from batchmix.engine.kv_cache import BlockPool, KVCache, OutOfBlocks
from batchmix.engine.prefix_cache import PrefixCache
from batchmix.engine.slots import EOS, LENGTH, STOP_STRING, STOP_TOKEN, WHOLE, Slots
from batchmix.engine.stats import EngineStats
from batchmix.errors import BatchmixError
from batchmix.guided.compile import Guides
from batchmix.model.backend import Chunk
from batchmix.model.mixtral import Mixtral
from batchmix.records import Batch, Completion, FinishReason, Prompt
from batchmix.report.clock import StageClock
from batchmix.report.device_clock import DeviceClock

_log = logging.getLogger(__name__)
PREFILL_CHUNK = 2048  # longer prompts are cut at multiples of it, so that where they are cut depends on them alone
_FINISH_REASON: dict[int, FinishReason] = {EOS: "stop", STOP_TOKEN: "stop", STOP_STRING: "stop", WHOLE: "stop",
                                          LENGTH: "length"}  # fmt: skip


@dataclass
class _Row:
    """One sample of a prompt that runs: what the host knows of a slot."""

    prompt: Prompt
    sample: int
    order: int  # of admission; the youngest row gives way when blocks run out
    blocks: list[int]


@dataclass
class _Waiting:
    """A prompt with the samples of it that have not run yet."""

    prompt: Prompt
    samples: list[int]


@dataclass
class _Admission:
    """A prompt on its way through prefill, with the slots' worth of samples that start from it."""

    prompt: Prompt
    samples: list[int]
    blocks: list[int]
    cached: int  # tokens whose keys and values are there already: a shared prefix
    last_hidden: torch.Tensor | None = field(default=None, repr=False)  # [D]


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
        guides: Guides | None = None,
    ) -> None:
        """`steps_per_read`: decode steps between two looks at what they did; more than 1 needs a backend that leaves
        ended rows alone. `capture` makes a CUDA graph of a step."""
        self.guides = guides
        self.model = model
        self.ops = model.ops
        self.cache = cache
        self.pool = BlockPool(cache.num_blocks)
        self.prefixes = PrefixCache(self.pool, cache.block_size) if share_prefix else None
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.should_stop = should_stop
        self.prefill_chunk = prefill_chunk
        blocks_per_row = -(-max_model_len // cache.block_size)
        if blocks_per_row > self.pool.num_blocks:
            raise ValueError(f"{self.pool.num_blocks} KV blocks cannot hold one row of {max_model_len} tokens")
        self.device = cache.keys.device
        self._make_slots = partial(
            Slots,
            vocab_size=model.config.vocab_size,
            blocks_per_row=blocks_per_row,
            eos_token_ids=eos_token_ids,
            stop_table=stop_table,
            device=self.device,
            row_tile=self.ops.row_tile,
            steps_per_read=steps_per_read,
            guides=guides,
        )
        self._make_graphs = partial(StepGraphs, capture)
        self.slots = self._make_slots(max_num_seqs)
        self.steps_per_read = steps_per_read
        self.graphs = self._make_graphs()
        self.ladder = ladder(max_num_seqs)
        self.rows: list[_Row] = []  # of slot 0, 1, ...
        self.waiting: deque[_Waiting] = deque()
        self.stats = EngineStats(kv_blocks_total=self.pool.num_blocks)
        self.clock = StageClock()
        self.device_clock = DeviceClock(cache.keys.device)
        self._admitted = 0
        self._admissions: list[_Admission] = []  # taken out of `waiting` by the step that runs
        self._collected_tokens = 0
        self._mean_length = 0.0  # of the completions so far, to guess how far new rows will grow

    @torch.inference_mode()
    def generate(self, batches: Iterable[Batch]) -> Iterator[Completion]:
        """Run every prompt of every batch; completions come out as rows end. Stops early when `should_stop()`.

        Under tensor parallelism every rank runs this on the same batches, so nothing here may be decided by a clock.
        """
        batches = iter(batches)
        more = True
        while not self.should_stop():
            while more and len(self.waiting) < self.slots.capacity:
                batch = next(batches, None)
                more = batch is not None
                if batch is not None:
                    yield from self._enqueue(batch)
            if self._worth_refilling():
                self._attempt("prefill", self._admit)
                yield from self._collect()
            elif self.rows:
                self._attempt("decode", self._decode)
                yield from self._collect()
            elif not more and not self.waiting:
                return

    def _attempt(self, name: str, step: Callable[[], None]) -> None:
        """Run one step; where the device has no memory for it, go on with half the batch."""
        try:
            with self.clock.stage(name):
                step()
            return
        except torch.OutOfMemoryError:
            if self.model.shards.size > 1:  # the other ranks know nothing of it
                raise BatchmixError(
                    f"out of memory in a {name} step with {self.slots.capacity} rows at once, on one of several ranks;"
                    " lower engine.max_num_seqs or engine.gpu_memory_utilization"
                ) from None
            # What the failed step held is freed with the traceback, so before `_start_over`.
        self._start_over(name)

    def _start_over(self, step: str) -> None:
        """Put every row back and rebuild the state for half as many. Rows run again and, keyed as they are, end the same."""
        before = self.slots.capacity, self.max_num_batched_tokens
        if before[0] == 1 and before[1] <= self.prefill_chunk:
            raise BatchmixError(
                "out of memory with one row at a time; lower engine.gpu_memory_utilization or model.max_model_len"
            )
        again: dict[int, _Waiting] = {}
        running = [(row.prompt, row.sample) for row in sorted(self.rows, key=lambda row: row.order)]
        for prompt, sample in running + [(a.prompt, sample) for a in self._admissions for sample in a.samples]:
            waiting = again.setdefault(id(prompt), _Waiting(prompt, []))
            if sample not in waiting.samples:
                waiting.samples.append(sample)
        self.waiting.extendleft(reversed(again.values()))
        self.max_num_batched_tokens = max(self.prefill_chunk, before[1] // 2)
        self.rows, self._admissions = [], []
        self.pool = BlockPool(self.cache.num_blocks)
        if self.prefixes is not None:
            self.prefixes = PrefixCache(self.pool, self.cache.block_size)
        self.slots, self.graphs = self._make_slots(max(1, before[0] // 2)), self._make_graphs()
        self.ladder = ladder(self.slots.capacity)
        if self.cache.keys.is_cuda:
            torch.cuda.empty_cache()
        self.stats.out_of_memory += 1
        self.stats.completion_tokens = self._collected_tokens
        self.stats.running, self.stats.waiting = 0, len(self.waiting)
        _log.warning(
            "out of memory in a %s step: %d rows are put back; going on with %d rows at once (was %d) and %s prompt tokens"
            " in a step (was %s)", step, len(again), self.slots.capacity, before[0],
            f"{self.max_num_batched_tokens:,}", f"{before[1]:,}",
        )  # fmt: skip

    def _enqueue(self, batch: Batch) -> Iterator[Completion]:
        for prompt in batch.prompts:
            if prompt.error is not None:
                yield Completion.failed(prompt, prompt.error)
            else:
                self.waiting.append(_Waiting(prompt, list(prompt.samples or range(prompt.sampling.n))))
        self.stats.waiting = len(self.waiting)

    def _worth_refilling(self) -> bool:
        """Whether enough slots are free that a prefill step runs well: an eighth of them, or all that still run."""
        free = self.slots.capacity - len(self.rows)
        return (
            bool(self.waiting)
            and (free >= max(1, self.slots.capacity // 8) or not self.rows)
            and self._fits(self.waiting[0])
        )

    def _fits(self, waiting: _Waiting) -> bool:
        """Whether the next prompt finds a slot, and blocks for itself and for what the running rows will likely need."""
        if len(self.rows) >= self.slots.capacity:
            return False
        if not self.rows:
            return True
        size = self.cache.block_size
        expected = self._mean_length or 64.0
        needed = len(waiting.prompt.token_ids) + min(expected, waiting.prompt.sampling.max_tokens)
        generated = self.slots.host["generated"][: len(self.rows)]
        limit = np.minimum(np.maximum(expected, 2.0 * generated), self.slots.host["max_tokens"][: len(self.rows)])
        reserve = float(np.maximum(limit - generated, 0).sum())
        needed += reserve + size * (len(self.rows) + 1)
        return self.pool.num_free * size >= needed or self._num_available() * size >= needed

    def _num_available(self) -> int:
        """Blocks that are free, or can be: prefixes stay in the cache only for as long as there is room."""
        return self.pool.num_free + (self.prefixes.num_unused() if self.prefixes is not None else 0)

    def _take(self, count: int) -> list[int]:
        """`count` blocks; OutOfBlocks if fewer are available."""
        if self.prefixes is not None:
            self.prefixes.release(count - self.pool.num_free)
        return self.pool.take(count)

    def _admit(self) -> None:
        """Fill free slots with waiting prompts: take their blocks, prefill them packed, choose their first tokens."""
        self.stats.first_prefill_time = self.stats.first_prefill_time or time.time()
        size = self.cache.block_size
        admissions: list[_Admission] = []
        self._admissions = admissions
        slots_left = self.slots.capacity - len(self.rows)
        promised = 0  # blocks for further samples, taken when those start
        while self.waiting and slots_left and (not admissions or self._fits(self.waiting[0])):
            waiting = self.waiting[0]
            prompt, samples = waiting.prompt, waiting.samples[:slots_left]
            shared = self.prefixes.lookup(prompt.token_ids, prompt.shared_tokens) if self.prefixes is not None else []
            num_blocks = -(-(len(prompt.token_ids) + 1) // size) - len(shared)
            available = self._num_available() - promised
            if num_blocks > available:
                self.pool.release(shared)
                break
            # Each further sample has a last block of its own.
            samples = samples[: 1 + available - num_blocks]
            promised += len(samples) - 1
            slots_left -= len(samples)
            blocks = shared + self._take(num_blocks)
            if self.prefixes is not None:  # from now on: prompts behind this one in the same prefill step may read them
                self.prefixes.keep(prompt.token_ids, prompt.shared_tokens, blocks)
            admissions.append(_Admission(prompt, samples, blocks, len(shared) * size))
            self.stats.shared_tokens += len(shared) * size
            del waiting.samples[: len(samples)]
            if not waiting.samples:
                self.waiting.popleft()
        self._prefill(admissions)
        self._start(admissions)
        self._admissions = []
        self.stats.waiting = len(self.waiting)

    def _prefill(self, admissions: list[_Admission]) -> None:
        """Run all prompts' chunks through the model, as many together as fit max_num_batched_tokens.

        A chunk that alone is longer runs alone: cutting it would change how its sums are rounded.
        """
        pack: list[tuple[_Admission, int, int]] = []  # admission, start, length
        room = self.max_num_batched_tokens
        for admission in admissions:
            total = len(admission.prompt.token_ids)
            for start in range(admission.cached, total, self.prefill_chunk):
                length = min(self.prefill_chunk, total - start)
                # What a chunk reads of earlier ones may be of its own step: each layer writes before it attends.
                if pack and length > room:
                    self._prefill_pack(pack)
                    pack, room = [], self.max_num_batched_tokens
                pack.append((admission, start, length))
                room -= length
        if pack:
            self._prefill_pack(pack)

    def _prefill_pack(self, pack: list[tuple[_Admission, int, int]]) -> None:
        lengths = np.array([length for _, _, length in pack])
        ends = lengths.cumsum()
        tokens = np.zeros(self._pad(int(ends[-1])), np.int64)
        chunks = []
        for (admission, start, length), end in zip(pack, ends.tolist(), strict=True):
            tokens[end - length : end] = admission.prompt.token_ids[start : start + length]
            chunks.append(Chunk(end - length, start, length, admission.blocks))
        attend = self.ops.prefill(self.model, self.cache, chunks, len(tokens))
        self.model.expert_load.count_first(int(ends[-1]))
        with self.device_clock.work("prefill"):
            hidden = self.model(torch.from_numpy(tokens).to(self.device), attend)
        for (admission, start, length), end in zip(pack, ends.tolist(), strict=True):
            if start + length == len(admission.prompt.token_ids):
                admission.last_hidden = hidden[end - 1].clone()
        self.stats.prompt_tokens += int(ends[-1])

    def _start(self, admissions: list[_Admission]) -> None:
        """Give every sample its slot and its first token."""
        first = len(self.rows)
        size = self.cache.block_size
        hidden = []
        for admission in admissions:
            prompt, blocks = admission.prompt, admission.blocks
            num_full = len(prompt.token_ids) // size
            limit = min(prompt.sampling.max_tokens, self.max_model_len - len(prompt.token_ids))
            for i, sample in enumerate(admission.samples):
                if i:  # full blocks are shared, the last one is the sample's own
                    own = self._take(1)
                    self.cache.copy_block(admission.blocks[-1], own[0])
                    self.pool.share(admission.blocks[:-1])
                    blocks = admission.blocks[:-1] + own
                assert num_full in (len(blocks), len(blocks) - 1)
                slot = self.slots.add(prompt, sample, limit)
                self.slots.block_table[slot, : len(blocks)] = blocks
                self.slots.num_blocks[slot] = len(blocks)
                self.rows.append(_Row(prompt, sample, self._admitted, list(blocks)))
                self._admitted += 1
                assert admission.last_hidden is not None
                hidden.append(admission.last_hidden)
        stacked = torch.stack(hidden + [torch.zeros_like(hidden[0])] * (self._pad(len(hidden)) - len(hidden)))
        self.slots.upload()
        with self.device_clock.work("prefill"):
            self._choose(first, self.model.logits(stacked)[: len(hidden)], decoded=False)
        self._read()

    def _pad(self, tokens: int) -> int:
        """`tokens` rounded up to a count that a step may have."""
        tile = self.ops.row_tile
        return -(-tokens // tile) * tile

    def _choose(self, first: int, logits: torch.Tensor, decoded: bool) -> None:
        tokens, logprobs = self.ops.choose(logits, self.slots, first)
        self.model.shards.agree(tokens)
        if logprobs is not None:
            self.slots.log_logprobs(first + logprobs.rows, logprobs.chosen, logprobs.top_ids, logprobs.top)
        self.ops.advance(self.slots, first, tokens, decoded)

    def _read(self) -> None:
        self.stats.completion_tokens += self.slots.read()
        self.stats.last_token_time = time.time()

    def _decode(self) -> None:
        """A few tokens for every active row, or one if their log-probabilities are wanted, which the host keeps."""
        active, host = len(self.rows), self.slots.host
        wants_logprobs = bool(host["wants_logprob"][:active].any())
        left = int((host["max_tokens"][:active] - host["generated"][:active]).max())
        steps = 1 if wants_logprobs else min(self.steps_per_read, left)
        self._take_blocks(steps)
        active = len(self.rows)
        # A power of two, so that a graph serves for a while.
        width = 1 << int(self.slots.num_blocks[:active].max() - 1).bit_length()
        width = min(width, self.slots.block_table.shape[1])
        captured = self.graphs.enabled and not wants_logprobs
        # A captured step runs over free slots too, so that few sizes serve all.
        size = rung(self.ladder, active) if captured else self._pad(active)
        self.slots.upload()
        self.ops.find_shared(self.model, self.cache, self.slots, size)
        self.model.expert_load.count_first(active)
        with self.device_clock.work("decode"):
            for _ in range(steps):
                if not captured:
                    self._step(active, size, width)
                else:
                    self.graphs.run((size, width), self.slots.tables(), partial(self._step, size, size, width))
        self._read()
        self.stats.running = active
        self.stats.kv_blocks_used = self.pool.num_used

    def _step(self, rows: int, size: int, width: int) -> None:
        """A token for slots 0..rows-1, in a step of `size` tokens; nothing here waits for the device."""
        attend = self.ops.decode(self.model, self.cache, self.slots, rows, size, width)
        hidden = self.model(self.slots.token[:size], attend)
        self._choose(0, self.model.logits(hidden)[:rows], decoded=True)

    def _take_blocks(self, steps: int) -> None:
        """The blocks that rows write to in so many steps; the youngest rows give way where there are too few."""
        while True:
            active = len(self.rows)
            host, held = self.slots.host, self.slots.num_blocks[:active]
            left = host["max_tokens"][:active] - host["generated"][:active]
            last = host["context"][:active] + np.minimum(steps, left) - 1  # position that is written last
            missing = np.maximum(last // self.cache.block_size + 1 - held, 0)
            needing = np.repeat(np.arange(active), missing)  # a slot as often as it needs blocks
            try:
                blocks = self._take(len(needing))
            except OutOfBlocks:
                self._put_back(max(range(active), key=lambda slot: self.rows[slot].order))
                continue
            for slot, block in zip(needing.tolist(), blocks, strict=True):
                self.slots.block_table[slot, len(self.rows[slot].blocks)] = block
                self.rows[slot].blocks.append(block)
            held += missing
            return

    def _put_back(self, slot: int) -> None:
        """Take a row out of the batch. It starts again later and, as its random numbers are keyed, ends the same."""
        row = self.rows[slot]
        self.stats.completion_tokens -= int(self.slots.num_read[slot])
        self._free(slot)
        if self.waiting and self.waiting[0].prompt is row.prompt:
            self.waiting[0].samples.insert(0, row.sample)
        else:
            self.waiting.appendleft(_Waiting(row.prompt, [row.sample]))

    def _free(self, slot: int) -> None:
        row = self.rows[slot]
        self.pool.release(row.blocks)
        self.slots.remove(slot, row.prompt.sampling)
        last = self.rows.pop()
        if last is not row:
            self.rows[slot] = last

    def _collect(self) -> Iterator[Completion]:
        """Hand out the rows that have ended and free their slots, the highest first so that slots below keep theirs."""
        ended = np.flatnonzero(self.slots.host["finish"][: len(self.rows)])
        completions = [self._completion(slot) for slot in ended.tolist()]
        for slot in ended[::-1].tolist():
            self._free(slot)
        if completions:
            total = sum(completion.num_tokens for completion in completions)
            self._collected_tokens += total
            mean = total / len(completions)
            self._mean_length = 0.9 * self._mean_length + 0.1 * mean if self._mean_length else mean
        yield from completions

    def _completion(self, slot: int) -> Completion:
        row, slots = self.rows[slot], self.slots
        sampling = row.prompt.sampling
        finish, count = int(slots.host["finish"][slot]), int(slots.num_read[slot])
        tokens = slots.tokens[slot, : count - (finish in (EOS, STOP_TOKEN))].tolist()
        stop_reason: str | int | None = None
        if finish == STOP_TOKEN:
            stop_reason = int(slots.host["stop_reason"][slot])
        elif finish == STOP_STRING:
            stop_reason = (sampling.stop or [])[int(slots.host["stop_reason"][slot])]
        logprobs = slots.row_logprobs(slot) if sampling.logprobs is not None else None
        return Completion(
            row.prompt,
            row.sample,
            tokens,
            _FINISH_REASON[finish],
            stop_reason,
            num_tokens=count,
            cumulative_logprob=None if logprobs is None else sum(entry.logprob for entry in logprobs),
            logprobs=logprobs,
        )
