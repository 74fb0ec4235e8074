"""The rows being decoded: one slot a row, every field a tensor over the slots.

Active rows fill slots 0..num_active-1, so that a step works on a leading slice: the last one takes a finished row's
slot. The device owns what steps change; the host adds, removes and moves rows, and `upload` queues that behind the
steps queued already. What steps did comes back as a `PendingStep`, which knows where each row has moved since.
Meanwhile the host counts on: a row has the tokens that were queued for it (`planned`), or has ended, and then steps
leave it alone.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from batchmix.engine.device_tables import DeviceTableCache, automaton, bias_key, bias_table, stop_key
from batchmix.engine.grammars import RowGrammars
from batchmix.engine.output_buffers import OutputBuffers
from batchmix.engine.request import EngineLimits
from batchmix.kernels.row_state import Finish, Flag, Number, Real, RowTensors, State
from batchmix.models.async_copy import AsyncCopy, CopyEvent, async_copy_to_gpu
from batchmix.models.backend import HostRows
from batchmix.models.kv_cache import SCRATCH_BLOCK
from batchmix.models.philox import row_key
from batchmix.models.step_tokens import DecodeTokens
from batchmix.models.torch_products import pad_rows
from batchmix.prompts.stop_strings import INSIDE, START, StopTable
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig
from batchmix.structured_output.compile import GrammarCompiler

_READ = slice(State.GENERATED, State.STOP_REASON + 1)  # of the state: what the host wants to know
_BLOCKS: tuple[tuple[type[IntEnum], torch.dtype], ...] = (
    (State, torch.int64), (Number, torch.int64), (Real, torch.float32), (Flag, torch.bool),
)  # fmt: skip
_TABLES = ("bias_row", "stop_base", "grammar_base", "grammar_class")  # -1 where a row has no such table
# Fields that are the prompt's sampling key.
_AS_ASKED = ("min_tokens", "top_k", "seed", *(real.name.lower() for real in Real), "ignore_eos")
_versions = itertools.count()  # of all batches of a process


class CpuGpuBuffer:
    """`array` on the host, `tensor` on the device, which sees changes once uploaded. Slots are along `axis`."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, fill: int = 0, axis: int = 0
    ) -> None:
        host = torch.full(shape, fill, dtype=dtype)
        self.array: np.ndarray = host.numpy()
        self.tensor = host.to(device, copy=True)
        self._axis = axis

    def upload(self, slots: np.ndarray) -> None:
        """Copy these slots, int64 [N], to the device."""
        device, changed = self.tensor.device, self.array.take(slots, self._axis)
        self.tensor.index_copy_(self._axis, async_copy_to_gpu(slots, device), async_copy_to_gpu(changed, device))


@dataclass
class PendingStep:
    """The rows' state after a step that is queued, on its way to the host."""

    slots: np.ndarray  # int64 [rows then]: where the row of slot 0, 1, ... is now, -1: gone
    event: CopyEvent
    scored: Callable[[], None] | None  # adds the log-probabilities of choices to their requests


class InputBatch:
    """State of up to `capacity` rows. Tensors are [capacity] unless a comment says otherwise, rounded up to the row
    tile: a step may run over free slots. Up to `limits.steps_per_read` steps run before a `record_step`."""

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        stop_table: Callable[[SamplingConfig], StopTable] | None,
        async_copy: AsyncCopy,
        grammars: GrammarCompiler | None,
        limits: EngineLimits,
    ) -> None:
        size, device = pad_rows(limits.max_num_seqs, limits.row_tile), async_copy.device
        self.capacity, self.vocab_size, self.async_copy = limits.max_num_seqs, vocab_size, async_copy
        self._build_stop_table = stop_table
        self.num_active = 0
        self.num_with_logprobs = 0  # rows that ask for log-probabilities, which are read back in every step
        self.version, self._uploaded = next(_versions), -1  # another one when rows have come, gone or moved
        self.eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        # The host's side of each field of the blocks; of a row's state, what it began with.
        self.host: dict[str, np.ndarray] = {}
        self._columns: list[CpuGpuBuffer] = []  # [fields, slots]
        for fields, dtype in _BLOCKS:
            buffer = CpuGpuBuffer((len(fields), size), dtype, device, axis=1)
            self._columns.append(buffer)
            self.host |= {field.name.lower(): buffer.array[field] for field in fields}
        self.state, self.numbers, self.reals, self.flags = (buffer.tensor for buffer in self._columns)
        self.token, self.context = self.state[State.TOKEN], self.state[State.CONTEXT]
        self.generated, self.finish = self.state[State.GENERATED], self.state[State.FINISH]
        blocks_per_row = -(-limits.max_model_len // limits.block_size)
        self._blocks = CpuGpuBuffer((size, blocks_per_row), torch.int32, device, SCRATCH_BLOCK)
        self.block_table, self.device_blocks = self._blocks.array, self._blocks.tensor
        self.num_blocks = np.zeros(size, np.int64)  # of the row's in block_table
        self._stops = CpuGpuBuffer((size, 1), torch.int64, device, -1)  # [slots, most of any row], -1: there are fewer
        self.num_logprobs = np.full(size, -1, np.int64)
        self.biases = DeviceTableCache(vocab_size, torch.float32, device)
        self.automata = DeviceTableCache(vocab_size + 1, torch.int64, device)  # next state; last column: string matched
        self.grammars = RowGrammars(grammars, vocab_size, device, size)
        # [slots, V], made when a row first needs them.
        self.output_counts: Tensor | None = None
        self.in_prompt: Tensor | None = None
        # The n-th token in column n % steps. It does not move with its row: a step is recorded before rows do.
        self.history = torch.zeros(size, limits.steps_per_read, dtype=torch.int32, device=device)
        self.logprob_history: Tensor | None = None  # float32, likewise; made when a row first needs it
        self.outputs = OutputBuffers(size)
        self.pending: deque[PendingStep] = deque()  # the oldest first
        self.prompt_tokens = np.zeros(size, np.int64)
        self.planned = np.zeros(size, np.int64)  # tokens of the row once all steps queued by now are done
        # What the device has to be told at the next upload.
        self._slots = np.arange(size)
        self._source = self._slots.copy()  # the slot whose state it is to take, -1: that of the host
        self._changed = np.zeros(size, np.bool_)  # what rows asked for
        self._moved_blocks = np.zeros(size, np.bool_)
        self._clear(slice(None))
        self.upload()

    def tables(self) -> tuple[object, ...]:
        """Where the tensors lie that are made anew when rows need larger ones: what a graph of a step relies on."""
        grown = (
            self._stops.tensor, self.biases.data, self.automata.data, self.output_counts, self.in_prompt,
            self.grammars.states.data, self.grammars.classes.data, self.logprob_history,
        )  # fmt: skip
        return tuple(None if table is None else (table.data_ptr(), table.shape) for table in grown)

    def rows(self, count: int) -> RowTensors:
        """What operators read and change of slots 0..count-1."""
        tables = self.grammars.states.data, self.grammars.classes.data
        # Where no row has had a grammar yet, steps do not look for any.
        states, classes = tables if len(tables[0]) else (None, None)
        return RowTensors(
            self.state, self.numbers, self.reals, self.flags, self._stops.tensor, self.eos_token_ids, self.biases.data,
            self.automata.data, self.output_counts, self.in_prompt, states, classes, self.history, self.logprob_history,
        ).narrow(count)  # fmt: skip

    def host_rows(self, count: int) -> HostRows:
        """What only the host knows of slots 0..count-1."""
        return HostRows(self.num_logprobs[:count], self.grammars.allowed_tokens, self.grammars.fill_bitmask)

    def upload(self) -> None:
        """Tell the device what the host has changed, in the order of its work."""
        changes = [(self._moved_blocks, [self._blocks])]
        if self._uploaded != self.version:
            self._uploaded = self.version
            is_new = self._source < 0
            moved = np.flatnonzero(~is_new & (self._source != self._slots))
            if len(moved):  # all at the same time
                targets, sources = (async_copy_to_gpu(x, self.state.device) for x in (moved, self._source[moved]))
                self.state.index_copy_(1, targets, self.state.index_select(1, sources))
            self._source[:] = self._slots
            state, *asked = self._columns
            changes += [(is_new, [state]), (self._changed, [*asked, self._stops])]
        for changed, buffers in changes:
            slots = np.flatnonzero(changed)
            if len(slots):
                for buffer in buffers:
                    buffer.upload(slots)
                changed[:] = False

    def record_planned(self, steps: int) -> None:
        """So many steps of the active rows are queued."""
        rows = self.num_active
        self.planned[:rows] = np.minimum(self.planned[:rows] + steps, self.host["max_tokens"][:rows])

    def left(self) -> np.ndarray:
        """Tokens that each active row can still be given, [num_active]."""
        return self.host["max_tokens"][: self.num_active] - self.planned[: self.num_active]

    def record_step(self, scored: Callable[[], None] | None = None) -> None:
        """Let the state of the active rows, once all that is queued by now is done, come to the host."""
        count = self.num_active
        rings = [ring[:count] for ring in (self.history, self.logprob_history) if ring is not None]
        event = self.async_copy.to_host([self.state[_READ, :count], *rings])
        self.pending.append(PendingStep(np.arange(count), event, scored))

    def decode_tokens(self, rows: int, size: int, width: int) -> DecodeTokens:
        """The last tokens of slots 0..rows-1, and with those of free slots `size` tokens. `width`: blocks of a row."""
        return DecodeTokens(
            self.context[:size], self.finish[:size] == Finish.RUNNING, self.device_blocks[:size, :width],
            self.prompt_tokens[:rows] + self.planned[:rows] - 1, self.block_table[:rows, :width],
        )  # fmt: skip

    def add(self, prompt: Prompt, sample: int, max_tokens: int) -> int:
        """Give the next free slot to one sample of a prompt whose tokens are in the cache."""
        slot = self.num_active
        self.num_active += 1
        self.version = next(_versions)
        sampling, host = prompt.sampling, self.host
        self.prompt_tokens[slot] = len(prompt.token_ids)
        host["context"][slot] = len(prompt.token_ids) - 1
        host["finish"][slot] = Finish.RUNNING
        host["max_tokens"][slot] = max_tokens
        host["sample"][slot] = sample
        host["row_key"][slot] = row_key(prompt.random_key)
        for key in _AS_ASKED:
            host[key][slot] = getattr(sampling, key)
        host["wants_logprob"][slot] = sampling.logprobs is not None
        self.num_with_logprobs += sampling.logprobs is not None
        self.num_logprobs[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self._set_stop_tokens(slot, list(dict.fromkeys(sampling.stop_token_ids or ())))
        if bias := bias_key(sampling):
            host["bias_row"][slot] = self.biases.acquire(bias, lambda: bias_table(sampling, self.vocab_size))
        if stop := stop_key(sampling):
            build = self._build_stop_table
            assert build is not None, "rows with stop strings are refused where there is no tokenizer"
            host["stop_base"][slot] = self.automata.acquire(stop, lambda: automaton(build(sampling)))
            host["stop_state"][slot] = INSIDE if sampling.min_tokens else START
        if sampling.structured_outputs is not None:
            found = self.grammars.acquire(slot, sampling, max_tokens)
            host["grammar_base"][slot], host["grammar_class"][slot], host["grammar_state"][slot] = found
            host["processed_logprobs"][slot] = sampling.structured_outputs.token_probabilities
            if sampling.structured_outputs.token_probabilities and self.logprob_history is None:
                self.logprob_history = torch.zeros_like(self.history, dtype=torch.float32)
        self._set_penalties(slot, prompt)
        self._source[slot], self._changed[slot] = -1, True
        return slot

    def add_blocks(self, slots: np.ndarray, blocks: Sequence[int]) -> None:
        """Add a block to the row of each slot, int64 [N], ascending; a slot is there once for each of its blocks."""
        number = np.arange(len(slots)) - np.searchsorted(slots, slots)  # of a block among its row's
        self.block_table[slots, self.num_blocks[slots] + number] = blocks
        np.add.at(self.num_blocks, slots, 1)
        self._moved_blocks[slots] = True

    def remove(self, slot: int, sampling: SamplingConfig) -> None:
        """Free a slot; the last active row moves into it."""
        if key := bias_key(sampling):
            self.biases.release(key)
        if key := stop_key(sampling):
            self.automata.release(key)
        self.grammars.release(slot)
        self.num_with_logprobs -= sampling.logprobs is not None
        self.num_active -= 1
        self.version = next(_versions)
        last = self.num_active
        for buffer in self._columns:
            buffer.array[:, slot] = buffer.array[:, last]
        for rows in (self.block_table, self._stops.array, self.num_blocks, self.num_logprobs, self.prompt_tokens,
                     self.planned, self._source, self.grammars.rows, self.output_counts, self.in_prompt,
                     *vars(self.outputs).values()):  # fmt: skip
            if rows is not None:
                rows[slot] = rows[last]
        self._changed[slot] = self._moved_blocks[slot] = True
        for step in self.pending:
            step.slots[step.slots == slot] = -1
            step.slots[step.slots == last] = slot
        self.grammars.rows[last] = None
        self._clear(last)

    def _clear(self, slots: int | slice) -> None:
        """Make free slots ones that a step may run over: a token in the scratch block, with nothing asked for."""
        for buffer in self._columns:
            buffer.array[:, slots] = 0
        self.host["finish"][slots] = Finish.FREE
        for name in _TABLES:
            self.host[name][slots] = -1
        self.block_table[slots] = SCRATCH_BLOCK
        self._stops.array[slots] = self.num_logprobs[slots] = -1
        for array in (self.num_blocks, self.prompt_tokens, self.planned, self.outputs.finish, self.outputs.stop_reason,
                      self.outputs.count):  # fmt: skip
            array[slots] = 0
        self._source[slots] = -1
        self._changed[slots] = self._moved_blocks[slots] = True

    def _set_stop_tokens(self, slot: int, ids: list[int]) -> None:
        known = self._stops.array
        if len(ids) > known.shape[1]:
            self._stops = CpuGpuBuffer((len(known), len(ids)), torch.int64, self.async_copy.device, -1)
            self._stops.array[:, : known.shape[1]] = known
            self._stops.upload(self._slots)
        self._stops.array[slot, : len(ids)] = ids

    def _set_penalties(self, slot: int, prompt: Prompt) -> None:
        sampling, device = prompt.sampling, self.async_copy.device
        penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        self.host["penalised"][slot] = penalties != (1.0, 0.0, 0.0)
        if penalties == (1.0, 0.0, 0.0):
            return
        if self.output_counts is None or self.in_prompt is None:
            self.output_counts = torch.zeros(len(self.token), self.vocab_size, dtype=torch.int32, device=device)
            self.in_prompt = torch.zeros(len(self.token), self.vocab_size, dtype=torch.bool, device=device)
        self.output_counts[slot] = 0
        self.in_prompt[slot] = False
        self.in_prompt[slot].index_fill_(0, async_copy_to_gpu(np.array(prompt.token_ids, np.int64), device), True)
