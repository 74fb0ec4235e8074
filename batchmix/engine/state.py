"""What an engine holds while it runs: waiting prompts, running rows, their slots and KV blocks. Nothing here computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from batchmix.engine.graphs import StepGraphs, capture_sizes
from batchmix.engine.kv_cache import BlockPool, KVCache
from batchmix.engine.prefix_cache import PrefixCache
from batchmix.engine.slots import InputBatch
from batchmix.engine.stats import EngineStats
from batchmix.records import Completion, Prompt


@dataclass
class Row:
    """One sample of a prompt that runs: what the host knows of a slot."""

    prompt: Prompt
    sample: int
    order: int  # of admission; the youngest row gives way when blocks run out
    blocks: list[int]


@dataclass
class Waiting:
    """A prompt with the samples of it that have not run yet."""

    prompt: Prompt
    samples: list[int]


@dataclass
class Admission:
    """A prompt on its way through prefill, with the slots' worth of samples that start from it."""

    prompt: Prompt
    samples: list[int]
    blocks: list[int]
    cached: int  # tokens whose keys and values are there already: a shared prefix
    last_hidden: torch.Tensor | None = field(default=None, repr=False)  # [D]


class State:
    """The one place where a run's state lives; admission, prefill, decode and restart work on it."""

    slots: InputBatch
    graphs: StepGraphs
    capture_sizes: list[int]
    pool: BlockPool
    prefixes: PrefixCache | None
    rows: list[Row]  # of slot 0, 1, ...
    admissions: list[Admission]  # taken out of `waiting` by the step that runs
    startable: int  # rows that could start instead of the next window of decode steps
    idle_reads: float  # readings of the weights that were lost to such rows since the last prefill

    def __init__(
        self,
        cache: KVCache,
        capacity: int,
        max_num_batched_tokens: int,
        full_prefill: int,
        make_slots: Callable[[int], InputBatch],
        make_graphs: Callable[[EngineStats], StepGraphs],
        share_prefix: bool,
    ) -> None:
        self.cache = cache
        self.max_num_batched_tokens = max_num_batched_tokens
        self.full_prefill = full_prefill  # tokens of a prefill step from which more do not make it run better
        self.waiting: deque[Waiting] = deque()
        self.stats = EngineStats(kv_blocks_total=cache.num_blocks - 1)
        self.completed: list[Completion] = []  # to be handed out
        self.num_admitted = 0
        self.mean_length = 0.0  # of the completions so far, to guess how far new rows will grow
        self._make_slots, self._make_graphs, self._share_prefix = make_slots, make_graphs, share_prefix
        self.renew(capacity)

    def renew(self, capacity: int) -> None:
        """Room for `capacity` rows, none of which is there yet; prompts that wait stay."""
        self.rows, self.admissions = [], []
        self.pool = BlockPool(self.cache.num_blocks)
        self.prefixes = PrefixCache(self.pool, self.cache.block_size) if self._share_prefix else None
        self.slots, self.graphs = self._make_slots(capacity), self._make_graphs(self.stats)
        self.capture_sizes = capture_sizes(capacity)
        self.startable, self.idle_reads = 0, 0.0

    def num_available(self) -> int:
        """Blocks that are free, or can be: prefixes stay in the cache only for as long as there is room."""
        return self.pool.num_free + (self.prefixes.num_unused() if self.prefixes is not None else 0)

    def take(self, count: int) -> list[int]:
        """`count` blocks; OutOfBlocks if fewer are available."""
        if self.prefixes is not None:
            self.prefixes.release(count - self.pool.num_free)
        return self.pool.take(count)

    def free(self, slot: int) -> None:
        """Take the row of a slot out of the batch; the last row's slot becomes this one."""
        row = self.rows[slot]
        self.pool.release(row.blocks)
        self.slots.remove(slot, row.prompt.sampling)
        last = self.rows.pop()
        if last is not row:
            self.rows[slot] = last

    def preempt(self, slot: int) -> None:
        """Take a row out of the batch. It starts again later and, as its random numbers are keyed, ends the same."""
        row = self.rows[slot]
        self.stats.preempted += 1
        self.stats.completion_tokens -= int(self.slots.answers.count[slot])
        self.free(slot)
        if self.waiting and self.waiting[0].prompt is row.prompt:
            self.waiting[0].samples.insert(0, row.sample)
        else:
            self.waiting.appendleft(Waiting(row.prompt, [row.sample]))
