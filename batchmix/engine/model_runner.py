"""Runs a step: the scheduler's plan as tensors, through the model, to a token for each row."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from batchmix.engine.cuda_graphs import StepGraphs, capture_sizes, pad_to_capture_size
from batchmix.engine.input_batch import InputBatch
from batchmix.engine.jump_forward import append_jump_forward
from batchmix.engine.scheduler import ScheduledChunk, Scheduler, ScoringRequest, Step
from batchmix.models.async_copy import async_copy_to_gpu
from batchmix.models.backend import DecodeTokens, PrefillChunk
from batchmix.models.kv_cache import KVCache
from batchmix.models.mixtral import Mixtral
from batchmix.observability.device_clock import DeviceClock

_LOGIT_ROWS = 256  # scored tokens whose logits exist at once


def pad(tokens: int, tile: int) -> int:
    """`tokens` rounded up to a count that a step may have, a multiple of the backend's `row_tile`."""
    return -(-tokens // tile) * tile


def sample(model: Mixtral, batch: InputBatch, logits: Tensor) -> None:
    """Append a token to slots 0..R-1. logits float32 [R, V], modified in place."""
    rows = len(logits)
    state = batch.rows(0, rows)
    tokens, logprobs, processed_logprobs = model.ops.sample(logits, state, batch.host_rows(0, rows))
    model.tp.broadcast(tokens)
    if logprobs is not None:  # read back in every step, so what is planned is what there is
        places = batch.planned[logprobs.rows]
        batch.outputs.append_logprobs(logprobs.rows, places, logprobs.chosen, logprobs.top_ids, logprobs.top)
    model.ops.post_update(tokens, state, processed_logprobs)


class ModelRunner:
    """Queues steps. Steps that only decode are CUDA graphs where there are any."""

    def __init__(
        self,
        model: Mixtral,
        cache: KVCache,
        scheduler: Scheduler,
        device_clock: DeviceClock,
        make_graphs: Callable[[], StepGraphs],
        wait_for_outputs: Callable[[], None],
    ) -> None:
        """`wait_for_outputs` reads back what is queued, while the model runs, where the host finds the next masks."""
        self.model, self.cache, self.scheduler, self.device_clock = model, cache, scheduler, device_clock
        self.make_graphs, self.wait_for_outputs = make_graphs, wait_for_outputs
        self.renew()

    def renew(self) -> None:
        """Drop all graphs: the scheduler has another batch."""
        self.graphs = self.make_graphs()
        self.capture_sizes = capture_sizes(self.scheduler.batch.capacity)

    def run(self, step: Step) -> None:
        """Queue the step, and the copy of its outcome to the host."""
        batch, stats = self.scheduler.batch, self.scheduler.stats
        scored = None
        if step.chunks or step.num_jump_forward:
            scored = self._run_ragged(step)
        else:
            self._run_decode(step)
        batch.record_planned(step.num_decode + step.num_starting, step.num_steps)
        batch.record_step(scored)
        stats.running = len(self.scheduler.running)
        stats.kv_blocks_used = self.scheduler.pool.num_used

    # A token for each row.

    def _run_decode(self, step: Step) -> None:
        batch, rows = self.scheduler.batch, step.num_decode
        # The host keeps some rows' log-probabilities, or finds their masks.
        captured = self.graphs.enabled and not batch.wants_logprobs() and not batch.grammars.texts
        # A captured step runs over free slots too, so that few sizes serve all.
        size = pad_to_capture_size(self.capture_sizes, rows) if captured else pad(rows, self.model.ops.row_tile)
        width = self._width(rows)
        batch.upload()
        shared = self._find_shared(batch.block_table[:size], batch.prompt_tokens[:size], keep=True)
        self.model.expert_load.set_num_valid(rows)
        queue = partial(self._decode, size if captured else rows, size, width, shared)
        for _ in range(step.num_steps):
            run = self.graphs.prepare((size, width), batch.tables(), queue) if captured else queue
            # Each step apart: gaps between them are no work.
            with self.device_clock.work("decode", size if captured else None):
                run()

    def _decode(self, rows: int, size: int, width: int, shared: object) -> None:
        """A token for slots 0..rows-1, in a step of `size` tokens; nothing here waits for the device."""
        model, batch, cache = self.model, self.scheduler.batch, self.cache
        decode = batch.decode_tokens(min(rows, batch.num_active), size, width)
        attend = cache.around_step(model.ops.attend(model, cache, decode, (), size, shared), decode, ())
        logits = model.logits(model(batch.token[:size], attend))[:rows]
        if batch.grammars.texts:  # while the model runs
            self.wait_for_outputs()
        sample(model, batch, logits)

    def _width(self, rows: int) -> int:
        """Blocks of a row in the step's table: a power of two, so that a graph serves for a while."""
        batch = self.scheduler.batch
        return min(1 << (int(batch.num_blocks[:rows].max()) - 1).bit_length(), int(batch.block_table.shape[1]))

    def _find_shared(self, block_table: np.ndarray, prompt_tokens: np.ndarray, keep: bool) -> object:
        version = self.scheduler.batch.version
        return self.model.ops.find_shared(self.model, self.cache, block_table, prompt_tokens, version, keep)

    # Any tokens of any rows.

    def _run_ragged(self, step: Step) -> Callable[[], None] | None:
        """Generated tokens, of rows and then jump-forward ones; then prompt chunks. See `_score` for what it returns."""
        model, scheduler, batch, cache = self.model, self.scheduler, self.scheduler.batch, self.cache
        device, stats = cache.keys.device, scheduler.stats
        rows, shared = step.num_decode, None
        decode: DecodeTokens | None = None
        generated = []  # token ids of the decoding rows and their jump-forward tokens
        if step.num_jump_forward:
            batch.upload()
            decode, tokens = append_jump_forward(batch, step.jump_forward, self._width(rows))
            generated.append(tokens)
            stats.jump_forward_tokens += step.num_jump_forward
            stats.completion_tokens += step.num_jump_forward
        num_decode = rows + step.num_jump_forward
        ids, chunks = self._pack(step.chunks, num_decode)
        num_prompt = len(ids)
        copies = [copy for chunk in step.chunks if chunk.is_last for copy in scheduler.start_samples(chunk)]
        batch.upload()
        if rows and decode is None:
            decode = batch.decode_tokens(rows, rows, self._width(rows))
            shared = self._find_shared(batch.block_table[:rows], batch.prompt_tokens[:rows], keep=False)
            generated.append(batch.token[:rows])
        size = pad(num_decode + num_prompt, model.ops.row_tile)
        padded = np.pad(ids, (0, size - num_decode - num_prompt))
        token_ids = torch.cat([*generated, async_copy_to_gpu(padded, device)])
        model.expert_load.set_num_valid(num_decode + num_prompt)
        attend = model.ops.attend(model, cache, decode, chunks, size, shared)
        with self.device_clock.work("prefill" if chunks else "decode"):
            hidden = model(token_ids, cache.around_step(attend, decode, chunks))
            if copies:
                cache.copy_blocks(*zip(*copies, strict=True))
            # The rows that decode, then one for each sample that starts, in the order of their slots.
            wanted = [*range(rows), *(
                packed.end - 1 for chunk, packed in zip(step.chunks, chunks, strict=True) if chunk.is_last
                for _ in chunk.request.samples
            )]  # fmt: skip
            if wanted:
                logits = model.logits(self._select(hidden, wanted))[: len(wanted)]
                if batch.grammars.texts:  # while the model runs
                    self.wait_for_outputs()
                sample(model, batch, logits)
            scored = self._score(hidden, step.chunks, chunks)
        for chunk in step.chunks:
            scheduler.pool.release(chunk.own_blocks)
        if chunks:
            stats.first_prefill_time = stats.first_prefill_time or time.time()
            stats.refills += bool(rows)
            stats.prompt_tokens += num_prompt
        return scored

    def _pack(self, scheduled: list[ScheduledChunk], first: int) -> tuple[np.ndarray, list[PrefillChunk]]:
        """Chunks without padding behind the step's first tokens, and their ids, int64."""
        ids, chunks = [np.zeros(0, np.int64)], list[PrefillChunk]()
        for chunk in scheduled:
            ids.append(np.asarray(chunk.token_ids, np.int64))
            chunks.append(PrefillChunk(first, chunk.start, len(chunk.token_ids), chunk.blocks))
            first += len(chunk.token_ids)
        return np.concatenate(ids), chunks

    def _select(self, hidden: Tensor, places: list[int]) -> Tensor:
        """Rows of hidden [T, D], padded to what a product may have."""
        padded = np.resize(np.array(places), pad(len(places), self.model.ops.row_tile))
        return hidden[async_copy_to_gpu(padded, hidden.device)]

    def _score(
        self, hidden: Tensor, scheduled: list[ScheduledChunk], chunks: list[PrefillChunk]
    ) -> Callable[[], None] | None:
        """A function that waits for the log-probabilities of the step's choices and adds them to their requests.

        Those of each token of a choice and of the end after it. None where there are no choices.
        """
        places: list[int] = []  # in the step, of the token before
        wanted: list[list[int]] = []  # any of these tokens may follow
        owners: list[tuple[ScoringRequest, int]] = []
        for chunk, packed in zip(scheduled, chunks, strict=True):
            if chunk.choice is None or not isinstance(chunk.request, ScoringRequest):
                continue
            following = [[token_id] for token_id in chunk.request.choices[chunk.choice]]
            first = packed.end - len(following) - 1
            following += [chunk.request.end_tokens] if chunk.request.end_tokens else []
            places += range(first, first + len(following))
            wanted += following
            owners += [(chunk.request, chunk.choice)] * len(following)
        if not owners:
            return None
        most, found = max(map(len, wanted)), []
        ids = np.array([[*tokens, *[-1] * (most - len(tokens))] for tokens in wanted])  # [N, most], -1: none
        for low in range(0, len(places), _LOGIT_ROWS):
            here = places[low : low + _LOGIT_ROWS]
            logits = self.model.logits(self._select(hidden, here))[: len(here)]  # float32 [N, V]
            following_ids = async_copy_to_gpu(ids[low : low + _LOGIT_ROWS], hidden.device)
            values = logits.gather(1, following_ids.clamp(min=0)).masked_fill(following_ids < 0, float("-inf"))
            found.append(values.double().logsumexp(-1) - logits.double().logsumexp(-1))
        event = self.scheduler.batch.async_copy.to_host([torch.cat(found)])

        def add() -> None:
            for (request, choice), logprob in zip(owners, event()[0].tolist(), strict=True):
                request.logprobs[choice] += logprob
            for request, _ in dict.fromkeys(owners):
                request.num_pending -= 1

        return add
