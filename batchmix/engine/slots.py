"""The rows being decoded: one slot a row, every field a tensor over the slots.

Active rows always fill slots 0..num_active-1: a finished row's slot is taken by the last active one, so that each
step works on a leading slice. The order of rows in the batch does not matter to any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from batchmix.config import SamplingConfig
from batchmix.data.stop_strings import INSIDE, START, StopTable
from batchmix.engine.kv_cache import SCRATCH_BLOCK
from batchmix.engine.philox import row_key
from batchmix.engine.shared_rows import SharedTables
from batchmix.records import Prompt, TokenLogprob

RUNNING, EOS, STOP_TOKEN, STOP_STRING, LENGTH = range(5)  # why a row ended


class Slots:
    """State of up to `capacity` rows. Tensors are [capacity] unless a comment says otherwise."""

    def __init__(
        self,
        capacity: int,
        vocab_size: int,
        blocks_per_row: int,
        eos_token_ids: Sequence[int],
        stop_table: Callable[[SamplingConfig], StopTable] | None,
        device: torch.device,
    ) -> None:
        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(capacity, *shape, dtype=dtype, device=device)

        self.capacity = capacity
        self.vocab_size = vocab_size
        self.build_stop_table = stop_table
        self.num_active = 0
        self.eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        # Where the row is.
        self.token = zeros(torch.int64)  # the last one chosen, whose keys and values are not in the cache yet
        self.context = zeros(torch.int64)  # tokens before it
        self.generated = zeros(torch.int64)
        self.finish = zeros(torch.int64)
        self.stop_reason = zeros(torch.int64)  # stop token id, or ordinal of the stop string
        self.block_table = np.full((capacity, blocks_per_row), SCRATCH_BLOCK, np.int64)
        self.num_blocks = np.zeros(capacity, np.int64)  # of the row's in block_table
        # What the row asked for.
        self.max_tokens, self.min_tokens = zeros(torch.int64), zeros(torch.int64)
        self.temperature, self.top_p, self.min_p = (zeros(torch.float32) for _ in range(3))
        self.top_k = zeros(torch.int64)
        self.repetition_penalty, self.presence_penalty, self.frequency_penalty = (
            zeros(torch.float32) for _ in range(3)
        )
        self.penalised = zeros(torch.bool)
        self.ignore_eos = zeros(torch.bool)
        self.seed, self.row_key, self.sample = (zeros(torch.int64) for _ in range(3))
        self.stop_token_ids = zeros(torch.int64, 1) - 1  # [capacity, most of any row], -1 where there are fewer
        self.num_logprobs = np.full(capacity, -1, np.int64)
        self.bias_row = zeros(torch.int64) - 1  # row of `biases`, -1: none
        self.stop_base = zeros(torch.int64) - 1  # first row of the automaton in `automata`, -1: none
        self.stop_state = zeros(torch.int64)
        self.biases = SharedTables(vocab_size, torch.float32, device)
        self.automata = SharedTables(vocab_size + 1, torch.int64, device)  # next state; last column: string matched
        # [capacity, V], made when a row first needs them.
        self.output_counts: Tensor | None = None
        self.in_prompt: Tensor | None = None
        # What the row has produced, on the host: [capacity, tokens so far, ...], grown as rows grow.
        self.tokens = np.zeros((capacity, 64), np.int32)
        self.logprobs = np.zeros((capacity, 0), np.float32)
        self.top_ids = np.zeros((capacity, 0, 0), np.int32)
        self.top_logprobs = np.zeros((capacity, 0, 0), np.float32)

    def add(self, prompt: Prompt, sample: int, max_tokens: int) -> int:
        """Give the next free slot to one sample of a prompt whose tokens are in the cache."""
        slot = self.num_active
        self.num_active += 1
        sampling = prompt.sampling
        self.context[slot] = len(prompt.token_ids)
        for counter in (self.generated, self.finish, self.stop_reason):
            counter[slot] = 0
        self.max_tokens[slot] = max_tokens
        self.sample[slot] = sample
        self.row_key[slot] = row_key(prompt.id)
        for key in ("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                    "frequency_penalty", "ignore_eos", "seed"):  # fmt: skip
            getattr(self, key)[slot] = getattr(sampling, key)
        self.num_logprobs[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self._set_stop_tokens(slot, sampling.stop_token_ids or [])
        self.bias_row[slot] = -1
        if _bias_key(sampling):
            self.bias_row[slot] = self.biases.acquire(_bias_key(sampling), lambda: self._bias(sampling))
        self.stop_base[slot] = -1
        if sampling.stop:
            self.stop_base[slot] = self.automata.acquire(_stop_key(sampling), lambda: self._automaton(sampling))
            self.stop_state[slot] = INSIDE if sampling.min_tokens else START
        self._set_penalties(slot, prompt)
        return slot

    def remove(self, slot: int, sampling: SamplingConfig) -> None:
        """Free a slot; the last active row moves into it."""
        if self.bias_row[slot] >= 0:
            self.biases.release(_bias_key(sampling))
        if self.stop_base[slot] >= 0:
            self.automata.release(_stop_key(sampling))
        self.num_active -= 1
        last = self.num_active
        for field in vars(self).values():
            if (
                isinstance(field, Tensor | np.ndarray)
                and len(field) == self.capacity
                and field is not self.eos_token_ids
            ):
                field[slot] = field[last]
        self.block_table[last] = SCRATCH_BLOCK
        self.context[last] = self.token[last] = 0

    def _set_stop_tokens(self, slot: int, ids: list[int]) -> None:
        width = self.stop_token_ids.shape[1]
        if len(ids) > width:
            more = self.stop_token_ids.new_full((self.capacity, len(ids) - width), -1)
            self.stop_token_ids = torch.cat((self.stop_token_ids, more), 1)
        self.stop_token_ids[slot] = -1
        self.stop_token_ids[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int64)

    def _set_penalties(self, slot: int, prompt: Prompt) -> None:
        sampling = prompt.sampling
        needed = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)
        self.penalised[slot] = needed
        if not needed:
            return
        if self.output_counts is None or self.in_prompt is None:
            device = self.token.device
            self.output_counts = torch.zeros(self.capacity, self.vocab_size, dtype=torch.int32, device=device)
            self.in_prompt = torch.zeros(self.capacity, self.vocab_size, dtype=torch.bool, device=device)
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

    def advance(self, first: int, tokens: Tensor) -> None:
        """Append one token to slots first..first+R-1 and see which rows have ended. tokens int64 [R]."""
        span = slice(first, first + len(tokens))
        self.token[span] = tokens
        self._log(self.generated[span].numpy(), span, tokens)
        self.generated[span] += 1
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
        hit = (tokens[:, None] == self.stop_token_ids[span]).any(1) & may_stop
        finish, reason = finish.masked_fill(hit, STOP_TOKEN), torch.where(hit, tokens, reason)
        hit = torch.isin(tokens, self.eos_token_ids) & ~self.ignore_eos[span] & may_stop
        self.finish[span] = finish.masked_fill(hit, EOS)
        self.stop_reason[span] = reason

    def _log(self, place: np.ndarray, span: slice, tokens: Tensor) -> None:
        self.tokens = _grow(self.tokens, int(place.max()) + 1)
        self.tokens[np.arange(span.start, span.stop), place] = tokens.numpy()

    def log_logprobs(self, slots: np.ndarray, chosen: Tensor, top_ids: Tensor, top: Tensor) -> None:
        """Keep the log-probabilities of the step's token; call before `advance`. [N], [N], [N, k], [N, k]."""
        place = self.generated.numpy()[slots]
        length, k = int(place.max()) + 1, top.shape[1]
        self.logprobs = _grow(self.logprobs, length)
        self.logprobs[slots, place] = chosen.numpy()
        wider = max(0, k - self.top_ids.shape[2])
        self.top_ids = _grow(np.pad(self.top_ids, ((0, 0), (0, 0), (0, wider))), length)
        self.top_logprobs = _grow(np.pad(self.top_logprobs, ((0, 0), (0, 0), (0, wider))), length)
        self.top_ids[slots, place, :k] = top_ids.numpy()
        self.top_logprobs[slots, place, :k] = top.numpy()

    def row_logprobs(self, slot: int) -> list[TokenLogprob]:
        """The log-probabilities of one row's tokens so far."""
        count, k = int(self.generated[slot]), int(self.num_logprobs[slot])
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
