"""The rows being decoded: one slot a row, every field a tensor over the slots.

Active rows always fill slots 0..num_active-1: a finished row's slot is taken by the last active one, so that each
step works on a leading slice. The order of rows in the batch does not matter to any of them.

Between steps the host owns the rows: it adds and removes them in its own memory and `upload`s the result. Steps run on
the device's copy, as many as the engine likes, then `read` brings back what they did. On the CPU both are one memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from batchmix.config import SamplingConfig
from batchmix.data.stop_strings import INSIDE, START, StopTable
from batchmix.engine.kv_cache import SCRATCH_BLOCK
from batchmix.engine.mirror import Mirror
from batchmix.engine.philox import row_key
from batchmix.engine.shared_rows import SharedTables
from batchmix.guided.compile import Guides, guide_key
from batchmix.guided.guide import Guide
from batchmix.records import Prompt, TokenLogprob

RUNNING, EOS, STOP_TOKEN, STOP_STRING, LENGTH = range(5)  # why a row ended
FREE = 5  # `finish` of a slot without a row: steps leave it alone, as they do rows that have ended
WHOLE = 6  # why a row ended: its guide allows no longer text

_STATE = ("token", "context", "generated", "finish", "stop_reason", "stop_state", "guide_state")  # changed by steps
_NUMBERS = (
    "max_tokens", "min_tokens", "top_k", "seed", "row_key", "sample", "bias_row", "stop_base", "guide_base",
    "guide_class",
)  # fmt: skip
_REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_FLAGS = ("penalised", "ignore_eos", "wants_logprob")
_AS_ASKED = ("min_tokens", "top_k", "seed", *_REALS, "ignore_eos")  # fields that are the prompt's sampling key


class Slots:
    """State of up to `capacity` rows. Tensors are [capacity] unless a comment says otherwise.

    With `row_tile` tensors are longer, a multiple of it, so that a step may run over free slots behind the active ones.
    `steps_per_read` is how many steps may run before a `read`.
    """

    # Where the row is, int64.
    token: Tensor  # the last one chosen, whose keys and values are not in the cache yet
    context: Tensor  # tokens before it
    generated: Tensor
    finish: Tensor
    stop_reason: Tensor  # stop token id, or ordinal of the stop string
    stop_state: Tensor
    guide_state: Tensor  # row of the state in `guide_tables`, counted from guide_base
    # What the row asked for: int64, float32, bool.
    max_tokens: Tensor
    min_tokens: Tensor
    top_k: Tensor
    seed: Tensor
    row_key: Tensor
    sample: Tensor
    bias_row: Tensor  # row of `biases`, -1: none
    stop_base: Tensor  # first row of the automaton in `automata`, -1: none
    guide_base: Tensor  # first row of the guide in `guide_tables`, -1: none
    guide_class: Tensor  # row of `guide_classes`, -1: none
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    penalised: Tensor
    ignore_eos: Tensor
    wants_logprob: Tensor

    def __init__(
        self,
        capacity: int,
        vocab_size: int,
        blocks_per_row: int,
        eos_token_ids: Sequence[int],
        stop_table: Callable[[SamplingConfig], StopTable] | None,
        device: torch.device,
        row_tile: int = 1,
        steps_per_read: int = 1,
        guides: Guides | None = None,
    ) -> None:
        size = -(-capacity // row_tile) * row_tile
        self.capacity = capacity
        self.vocab_size = vocab_size
        self.build_stop_table = stop_table
        self.guides = guides
        self.num_active = 0
        self.version = 0  # another one when rows have come, gone or moved
        self.eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        self.host: dict[str, np.ndarray] = {}  # the host's side of each field above
        self._columns: list[Mirror] = []  # [fields, slots]
        for names, dtype in (
            (_STATE, torch.int64),
            (_NUMBERS, torch.int64),
            (_REALS, torch.float32),
            (_FLAGS, torch.bool),
        ):
            mirror = Mirror((len(names), size), dtype, device)
            self._columns.append(mirror)
            for name, array, tensor in zip(names, mirror.array, mirror.tensor, strict=True):
                self.host[name] = array
                setattr(self, name, tensor)
        self._blocks = Mirror((size, blocks_per_row), torch.int32, device, SCRATCH_BLOCK)
        self.block_table, self.device_blocks = self._blocks.array, self._blocks.tensor
        self.num_blocks = np.zeros(size, np.int64)  # of the row's in block_table
        self._stops = Mirror((size, 1), torch.int64, device, -1)
        self.stop_token_ids = self._stops.tensor  # [capacity, most of any row], -1 where there are fewer
        self.num_logprobs = np.full(size, -1, np.int64)
        self.biases = SharedTables(vocab_size, torch.float32, device)
        self.automata = SharedTables(vocab_size + 1, torch.int64, device)  # next state; last column: string matched
        self.guide_tables = SharedTables(2, torch.int32, device)  # see Guide.table
        self.guide_classes = SharedTables(vocab_size, torch.int32, device)  # of each token
        self.row_guides: list[Guide | None] = [None] * size
        # [capacity, V], made when a row first needs them.
        self.output_counts: Tensor | None = None
        self.in_prompt: Tensor | None = None
        self._history = Mirror((size, steps_per_read), torch.int32, device)  # the n-th token in column n % steps
        self.history = self._history.tensor
        # What the row has produced, on the host: [capacity, tokens so far, ...], grown as rows grow.
        self.num_read = np.zeros(size, np.int64)  # tokens of the row in `tokens`
        self.tokens = np.zeros((size, 64), np.int32)
        self.logprobs = np.zeros((size, 0), np.float32)
        self.top_ids = np.zeros((size, 0, 0), np.int32)
        self.top_logprobs = np.zeros((size, 0, 0), np.float32)
        for slot in range(size):
            self._clear(slot)
        self.upload()

    def tables(self) -> tuple[object, ...]:
        """Where the tensors lie that are made anew when rows need larger ones: what a graph of a step relies on."""
        grown = (
            self.stop_token_ids, self.biases.data, self.automata.data, self.output_counts, self.in_prompt,
            self.guide_tables.data, self.guide_classes.data,
        )  # fmt: skip
        return tuple(None if table is None else (table.data_ptr(), table.shape) for table in grown)

    def upload(self) -> None:
        """Show the device what the host has changed. No more changes before the next `read`."""
        for mirror in (*self._columns, self._blocks, self._stops):
            mirror.upload()

    def read(self) -> int:
        """See what the steps since the last call did to the active rows. Returns how many tokens they chose."""
        self._columns[0].fetch()
        self._history.fetch()
        count = self.num_active
        before, after = self.num_read[:count], self.host["generated"][:count]
        chosen = after - before
        if count:
            self.tokens = _grow(self.tokens, int(after.max()))
        for step in range(int(chosen.max(initial=0))):
            rows = np.flatnonzero(step < chosen)
            place = before[rows] + step
            self.tokens[rows, place] = self._history.array[rows, place % self._history.array.shape[1]]
        self.num_read[:count] = after
        return int(chosen.sum())

    def add(self, prompt: Prompt, sample: int, max_tokens: int) -> int:
        """Give the next free slot to one sample of a prompt whose tokens are in the cache."""
        slot = self.num_active
        self.num_active += 1
        self.version += 1
        sampling = prompt.sampling
        host = self.host
        host["context"][slot] = len(prompt.token_ids)
        for counter in (host["generated"], host["stop_reason"], self.num_read):
            counter[slot] = 0
        host["finish"][slot] = RUNNING
        host["max_tokens"][slot] = max_tokens
        host["sample"][slot] = sample
        host["row_key"][slot] = row_key(prompt.id)
        for key in _AS_ASKED:
            host[key][slot] = getattr(sampling, key)
        host["wants_logprob"][slot] = sampling.logprobs is not None
        self.num_logprobs[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self._set_stop_tokens(slot, sampling.stop_token_ids or [])
        if _bias_key(sampling):
            host["bias_row"][slot] = self.biases.acquire(_bias_key(sampling), lambda: self._bias(sampling))
        if sampling.stop:
            host["stop_base"][slot] = self.automata.acquire(_stop_key(sampling), lambda: self._automaton(sampling))
            host["stop_state"][slot] = INSIDE if sampling.min_tokens else START
        if sampling.structured_outputs is not None:
            self._set_guide(slot, sampling)
        self._set_penalties(slot, prompt)
        return slot

    def remove(self, slot: int, sampling: SamplingConfig) -> None:
        """Free a slot; the last active row moves into it."""
        if self.host["bias_row"][slot] >= 0:
            self.biases.release(_bias_key(sampling))
        if self.host["stop_base"][slot] >= 0:
            self.automata.release(_stop_key(sampling))
        if self.host["guide_base"][slot] >= 0:
            self.guide_tables.release(guide_key(sampling))
            self.guide_classes.release(guide_key(sampling))
        self.num_active -= 1
        self.version += 1
        last = self.num_active
        for mirror in self._columns:
            mirror.array[:, slot] = mirror.array[:, last]
        for array in (self.block_table, self._stops.array, self.num_blocks, self.num_logprobs, self.num_read,
                      self._history.array, self.tokens, self.logprobs, self.top_ids, self.top_logprobs):  # fmt: skip
            array[slot] = array[last]
        self.row_guides[slot] = self.row_guides[last]
        if self.output_counts is not None and self.in_prompt is not None:
            for table in (self.output_counts, self.in_prompt):
                table[slot] = table[last]
        self._clear(last)

    def _clear(self, slot: int) -> None:
        """Make a free slot one that a step may run over: a token in the scratch block, and no wishes."""
        for mirror in self._columns:
            mirror.array[:, slot] = 0
        self.host["finish"][slot] = FREE
        for name in ("bias_row", "stop_base", "guide_base", "guide_class"):
            self.host[name][slot] = -1
        self.row_guides[slot] = None
        self.block_table[slot] = SCRATCH_BLOCK
        self._stops.array[slot] = -1
        self.num_blocks[slot] = 0
        self.num_logprobs[slot] = -1

    def _set_stop_tokens(self, slot: int, ids: list[int]) -> None:
        if len(ids) > self._stops.array.shape[1]:
            self._stops = self._stops.widened(len(ids), -1)
            self.stop_token_ids = self._stops.tensor
        self._stops.array[slot] = -1
        self._stops.array[slot, : len(ids)] = ids

    def _set_guide(self, slot: int, sampling: SamplingConfig) -> None:
        assert self.guides is not None, "rows with structured_outputs are refused where there is no tokenizer"
        guide, key = self.guides.get(sampling), guide_key(sampling)
        self.row_guides[slot] = guide
        self.host["guide_base"][slot] = self.guide_tables.acquire(key, lambda: torch.from_numpy(guide.table))
        classes = torch.from_numpy(guide.token_class)[None]
        self.host["guide_class"][slot] = self.guide_classes.acquire(key, lambda: classes)
        self.host["guide_state"][slot] = guide.start

    def _set_penalties(self, slot: int, prompt: Prompt) -> None:
        sampling = prompt.sampling
        needed = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)
        self.host["penalised"][slot] = needed
        if not needed:
            return
        if self.output_counts is None or self.in_prompt is None:
            device = self.token.device
            self.output_counts = torch.zeros(len(self.token), self.vocab_size, dtype=torch.int32, device=device)
            self.in_prompt = torch.zeros(len(self.token), self.vocab_size, dtype=torch.bool, device=device)
        self.output_counts[slot] = 0
        self.in_prompt[slot] = False
        self.in_prompt[slot, torch.as_tensor(prompt.token_ids, dtype=torch.int64, device=self.token.device)] = True

    def _bias(self, sampling: SamplingConfig) -> Tensor:
        bias = torch.zeros(1, self.vocab_size)
        if sampling.allowed_token_ids is not None:
            bias.fill_(float("-inf"))
            bias[0, sampling.allowed_token_ids] = 0.0
        for token, value in (sampling.logit_bias or {}).items():
            bias[0, token] += value
        return bias

    def _automaton(self, sampling: SamplingConfig) -> Tensor:
        assert self.build_stop_table is not None, "rows with stop strings are refused where there is no tokenizer"
        table = self.build_stop_table(sampling)
        return torch.from_numpy(np.concatenate((table.next_state, table.matched[:, None]), 1).astype(np.int64))

    def advance(self, first: int, tokens: Tensor, decoded: bool = False) -> None:
        """Append one token to slots first..first+R-1 and see which rows have ended. tokens int64 [R].

        `decoded`: after a decode step, which has put the token before it into the cache. The torch backend's form: on
        the CPU, and none of the rows has ended before.
        """
        span = slice(first, first + len(tokens))
        self.token[span] = tokens
        place = self.generated[span, None] % self.history.shape[1]
        self.history[span].scatter_(1, place, tokens[:, None].int())
        self.generated[span] += 1
        if decoded:
            self.context[span] += 1
        if self.output_counts is not None:
            rows = torch.nonzero(self.penalised[span])[:, 0]
            self.output_counts[first + rows, tokens[rows]] += 1
        generated = self.generated[span]
        finish = torch.where(generated >= self.max_tokens[span], LENGTH, RUNNING)
        reason = torch.zeros_like(tokens)
        may_stop = generated >= self.min_tokens[span]
        base = self.stop_base[span]
        if bool((base >= 0).any()):
            # Rows that search no stop string here, those below min_tokens too, walk from row 0 and are masked out.
            searched = (base >= 0) & (generated > self.min_tokens[span])
            base, old = torch.where(searched, base, 0), self.stop_state[span]
            state = self.automata.data[base + torch.where(searched, old, 0), tokens]
            matched = self.automata.data[base + state, -1]
            self.stop_state[span] = torch.where(searched, state, old)
            hit = searched & (matched >= 0)
            finish, reason = finish.masked_fill(hit, STOP_STRING), torch.where(hit, matched, reason)
        finish = self._advance_guides(span, tokens, finish)
        hit = (tokens[:, None] == self.stop_token_ids[span]).any(1) & may_stop
        finish, reason = finish.masked_fill(hit, STOP_TOKEN), torch.where(hit, tokens, reason)
        hit = torch.isin(tokens, self.eos_token_ids) & ~self.ignore_eos[span] & may_stop
        self.finish[span] = finish.masked_fill(hit, EOS)
        self.stop_reason[span] = reason

    def _advance_guides(self, span: slice, tokens: Tensor, finish: Tensor) -> Tensor:
        """Take the tokens in the rows' guides; `finish` with the rows whose text cannot be longer, [R] -> [R]."""
        guided = torch.nonzero(self.guide_base[span] >= 0)[:, 0]
        if not len(guided):
            return finish
        base, old = self.guide_base[span][guided], self.guide_state[span][guided]
        token_class = self.guide_classes.data[self.guide_class[span][guided], tokens[guided]]
        state = self.guide_tables.data[base + old + token_class, 0].long()
        self.guide_state[span][guided] = state
        over, longer = self.guide_tables.data[base + state].unbind(-1)
        left = (self.max_tokens[span] - self.generated[span])[guided]
        why = torch.where(over > 0, WHOLE, LENGTH)
        return finish.index_copy(0, guided, torch.where(longer > left, why, finish[guided]))

    def log_logprobs(self, slots: np.ndarray, chosen: Tensor, top_ids: Tensor, top: Tensor) -> None:
        """Keep the log-probabilities of the step's token; call before `advance`. [N], [N], [N, k], [N, k]."""
        place = self.host["generated"][slots]
        length, k = int(place.max()) + 1, top.shape[1]
        self.logprobs = _grow(self.logprobs, length)
        self.logprobs[slots, place] = chosen.cpu().numpy()
        wider = max(0, k - self.top_ids.shape[2])
        self.top_ids = _grow(np.pad(self.top_ids, ((0, 0), (0, 0), (0, wider))), length)
        self.top_logprobs = _grow(np.pad(self.top_logprobs, ((0, 0), (0, 0), (0, wider))), length)
        self.top_ids[slots, place, :k] = top_ids.cpu().numpy()
        self.top_logprobs[slots, place, :k] = top.cpu().numpy()

    def row_logprobs(self, slot: int) -> list[TokenLogprob]:
        """The log-probabilities of one row's tokens so far."""
        count, k = int(self.num_read[slot]), int(self.num_logprobs[slot])
        return [
            TokenLogprob(
                int(self.tokens[slot, i]),
                float(self.logprobs[slot, i]),
                tuple(zip(self.top_ids[slot, i, :k].tolist(), self.top_logprobs[slot, i, :k].tolist(), strict=True)),
            )
            for i in range(count)
        ]


def _bias_key(sampling: SamplingConfig) -> tuple[object, ...]:
    """What makes two rows share a bias table; empty where there is none."""
    if sampling.logit_bias is None and sampling.allowed_token_ids is None:
        return ()
    allowed = None if sampling.allowed_token_ids is None else tuple(sampling.allowed_token_ids)
    return tuple(sorted((sampling.logit_bias or {}).items())), allowed


def _stop_key(sampling: SamplingConfig) -> tuple[object, ...]:
    """What makes two rows share an automaton."""
    return tuple(sampling.stop or ()), sampling.skip_special_tokens


def _grow(log: np.ndarray, length: int) -> np.ndarray:
    """`log` with room for `length` tokens along its second axis, doubling it where there is none."""
    if length <= log.shape[1]:
        return log
    extra = max(length, 2 * log.shape[1]) - log.shape[1]
    return np.pad(log, ((0, 0), (0, extra)) + ((0, 0),) * (log.ndim - 2))
