"""Rows that choose one of a few texts: every choice is scored in the prefill, and nothing is decoded.

A choice's probability is the product of those of its tokens and of the end after them, as the model gives them, over the
sum of that product for all choices. So they are exact, whatever temperature and seed: those only pick the answer.

All choices of a row are chunks of one packed prefill. The prompt's whole blocks are computed once; from the start of its
last block on each choice has blocks of its own, which begin with that rest of the prompt. Where chunks are cut depends on
the row alone, and so does each bit of its probabilities where that holds for the backend's prefill.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from batchmix.engine.async_copy import async_copy_to_gpu
from batchmix.engine.state import State
from batchmix.engine.step import Piece, pad, prefill
from batchmix.guided.compile import GrammarCompiler
from batchmix.model.mixtral import Mixtral
from batchmix.model.philox import row_key, uniform
from batchmix.records import Completion, Prompt
from batchmix.report.device_clock import DeviceClock

_LOGIT_ROWS = 256  # positions whose logits exist at once


@dataclass
class _Scored:
    """A row on its way."""

    prompt: Prompt
    token_ids: list[int]
    choices: list[list[int]]
    end_tokens: list[int]
    blocks: list[int]  # whole ones of the prompt
    cached: int  # tokens whose keys and values are there already: a shared prefix
    logprobs: np.ndarray  # float64, of each choice


@dataclass
class _Piece(Piece):
    """Some of a row's prompt, or the rest of it and one choice."""

    row: _Scored
    choice: int | None
    own: int  # blocks at the end that are the piece's own


@dataclass
class _Pack:
    """Pieces of one model step of up to `max_tokens`."""

    max_tokens: int
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.token_ids) for piece in self.pieces)

    @property
    def room(self) -> int:
        return self.max_tokens - self.num_tokens


class Choices:
    """Scores the prompts in `waiting`; their completions go to `state.completed`."""

    def __init__(
        self,
        model: Mixtral,
        state: State,
        device_clock: DeviceClock,
        chunk_tokens: int,
        grammars: GrammarCompiler | None,
    ) -> None:
        self.model, self.state, self.device_clock, self.grammars = model, state, device_clock, grammars
        self.chunk_tokens = chunk_tokens
        self.waiting: deque[Prompt] = deque()

    def ready(self) -> bool:
        """Whether the first prompt finds the blocks that it cannot do without."""
        return bool(self.waiting) and self._least_blocks(self.waiting[0]) <= self.state.num_available()

    def run(self) -> None:
        """Score as many prompts as find blocks and fill one prefill step."""
        state = self.state
        state.stats.first_prefill_time = state.stats.first_prefill_time or time.time()
        pack = _Pack(state.max_num_batched_tokens)
        scored: list[_Scored] = []
        for prompt in self.waiting:
            full = pack.num_tokens >= state.max_num_batched_tokens
            if scored and (full or self._least_blocks(prompt) > state.num_available()):
                break
            row = self._begin(prompt)
            scored.append(row)
            common = len(row.blocks) * state.cache.block_size
            for start in range(row.cached, common, self.chunk_tokens):
                ids = row.token_ids[start : min(start + self.chunk_tokens, common)]
                pack = self._add(pack, _Piece(ids, start, row.blocks, row, None, 0))
            for choice, ids in enumerate(row.choices):
                tail = row.token_ids[common:] + ids
                pack = self._add(pack, _Piece(tail, common, row.blocks, row, choice, self._num_blocks(len(tail))))
        self._score(pack)
        for row in scored:
            self.waiting.popleft()
            state.pool.release(row.blocks)
            state.completed += self._completions(row)
        state.stats.last_token_time = time.time()

    def _add(self, pack: _Pack, piece: _Piece) -> _Pack:
        """Put a piece into the pack, or into a new one where there is no room or there are no blocks for it."""
        if pack.pieces and (len(piece.token_ids) > pack.room or piece.own > self.state.num_available()):
            self._score(pack)
            pack = _Pack(self.state.max_num_batched_tokens)
        piece.blocks = piece.blocks + self.state.take(piece.own)
        pack.pieces.append(piece)
        return pack

    def _begin(self, prompt: Prompt) -> _Scored:
        """Take the blocks of the prompt that its choices share; its last token is always computed with each of them."""
        state, ids = self.state, list(prompt.token_ids)
        count = self._whole_blocks(prompt)
        shared = min(prompt.shared_tokens, count * state.cache.block_size)
        blocks = state.prefixes.lookup(ids, shared) if state.prefixes is not None else []
        cached = len(blocks) * state.cache.block_size
        state.stats.shared_tokens += cached
        blocks = blocks + state.take(count - len(blocks))
        if state.prefixes is not None:
            state.prefixes.keep(ids, shared, blocks)
        choices = self._choices(prompt)
        return _Scored(prompt, ids, choices, self._end_tokens(prompt), blocks, cached, np.zeros(len(choices)))

    def _choices(self, prompt: Prompt) -> list[list[int]]:
        assert self.grammars is not None, "rows with structured_outputs are refused where there is no tokenizer"
        return self.grammars.choice_tokens(prompt.sampling)

    def _whole_blocks(self, prompt: Prompt) -> int:
        return (len(prompt.token_ids) - 1) // self.state.cache.block_size

    def _num_blocks(self, tokens: int) -> int:
        return -(-tokens // self.state.cache.block_size)

    def _least_blocks(self, prompt: Prompt) -> int:
        """Of the prompt and its longest choice."""
        return self._num_blocks(len(prompt.token_ids) + max(map(len, self._choices(prompt))))

    def _score(self, pack: _Pack) -> None:
        """Run the pack; add the log-probabilities of each choice and of the end after it to its row's. Frees its blocks."""
        hidden, ends = prefill(self.model, self.state, self.device_clock, pack.pieces)
        places: list[int] = []  # in the pack, of the token before
        wanted: list[list[int]] = []  # any of these tokens may follow
        of: list[_Piece] = []
        for piece, end in zip(pack.pieces, ends, strict=True):
            if piece.choice is None:
                continue
            following = [[token_id] for token_id in piece.row.choices[piece.choice]]
            first = end - len(following) - 1
            following += [piece.row.end_tokens] if piece.row.end_tokens else []
            places += range(first, first + len(following))
            wanted += following
            of += [piece] * len(following)
        for piece, logprob in zip(of, self._logprobs(hidden, places, wanted), strict=True):
            assert piece.choice is not None
            piece.row.logprobs[piece.choice] += logprob
        for piece in pack.pieces:
            if piece.own:
                self.state.pool.release(piece.blocks[-piece.own :])

    def _end_tokens(self, prompt: Prompt) -> list[int]:
        assert self.grammars is not None
        return self.grammars.end_tokens(prompt.sampling)

    def _logprobs(self, hidden: torch.Tensor, places: list[int], wanted: Sequence[Sequence[int]]) -> list[float]:
        """The log-probability that one of the wanted tokens follows, at each place of hidden [T, D]."""
        device, found = hidden.device, []
        most = max(map(len, wanted), default=0)
        ids = np.array([[*tokens, *[-1] * (most - len(tokens))] for tokens in wanted])  # [N, most], -1: none
        for low in range(0, len(places), _LOGIT_ROWS):
            chosen = np.array(places[low : low + _LOGIT_ROWS])
            padded = np.resize(chosen, pad(len(chosen), self.model.ops.row_tile))
            logits = self.model.logits(hidden[async_copy_to_gpu(padded, device)])[: len(chosen)]  # float32 [N, V]
            here = async_copy_to_gpu(ids[low : low + _LOGIT_ROWS], device)
            values = logits.gather(1, here.clamp(min=0)).masked_fill(here < 0, float("-inf"))
            found.append((values.double().logsumexp(-1) - logits.double().logsumexp(-1)).cpu())
        return torch.cat(found).tolist() if found else []

    def _completions(self, row: _Scored) -> list[Completion]:
        """One for each sample: the most likely choice, or one drawn at the row's temperature."""
        prompt, choices, logprobs = row.prompt, row.choices, row.logprobs
        sampling = prompt.sampling
        weights = np.exp(logprobs - logprobs.max())
        probabilities = (weights / weights.sum()).tolist()
        completions = []
        for sample in prompt.samples or range(sampling.n):
            best = int(logprobs.argmax())
            if sampling.temperature > 0:
                running = np.exp((logprobs - logprobs.max()) / sampling.temperature).cumsum()
                key = [torch.tensor([value]) for value in (sampling.seed, row_key(prompt.id), sample, 0)]
                best = min(int(np.searchsorted(running, float(uniform(*key)) * running[-1], "right")), len(choices) - 1)
            completions.append(
                Completion(
                    prompt,
                    sample,
                    choices[best],
                    "stop",
                    num_tokens=len(choices[best]),
                    choice_probabilities=probabilities,
                )
            )
            self.state.stats.completion_tokens += len(choices[best])
        return completions
