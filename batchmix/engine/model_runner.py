"""Runs a step: the scheduler's plan as tensors, through the model, to a token for each row."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from batchmix.engine.cuda_graphs import Capture, StepGraphs, capture_sizes, pad_to_capture_size
from batchmix.engine.input_batch import InputBatch
from batchmix.engine.jump_forward import append_jump_forward
from batchmix.engine.output_processor import wait_for_steps
from batchmix.engine.request import EngineLimits, Request, ScheduledChunk, Step
from batchmix.engine.scheduler import Scheduler
from batchmix.models.async_copy import AsyncCopy, async_copy_to_gpu
from batchmix.models.kv_cache import BLOCK_SIZE, SCRATCH_BLOCK, KVCache
from batchmix.models.mixtral import Mixtral
from batchmix.models.step_tokens import StepTokens
from batchmix.models.torch_products import pad_rows
from batchmix.observability.device_clock import DeviceClock
from batchmix.observability.engine_stats import EngineStats
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig

_LOGIT_ROWS = 256  # scored tokens whose logits exist at once


class ModelRunner:
    """Queues steps. Steps that only decode are CUDA graphs where there are any."""

    def __init__(self, model: Mixtral, cache: KVCache, scheduler: Scheduler, capture: Capture | None) -> None:
        self.model, self.cache, self.scheduler, self.capture = model, cache, scheduler, capture
        self.device_clock = DeviceClock(cache.keys.device)
        self.renew()

    def renew(self) -> None:
        """Drop all graphs: the scheduler has another batch."""
        self.graphs = StepGraphs(self.capture, self.scheduler.stats)
        self.capture_sizes = capture_sizes(self.scheduler.batch.capacity)

    def run(self, step: Step) -> None:
        """Queue the step, and the copy of its outcome to the host."""
        batch, stats = self.scheduler.batch, self.scheduler.stats
        scored = None
        if step.chunks or step.num_jump_forward:
            scored = self._run_ragged(step)
        else:
            self._run_decode(step)
        batch.record_planned(step.num_steps)
        batch.record_step(scored)
        streamed = self.model.streamed_bytes + self.cache.streamed_bytes
        stats.decode_streamed_bytes += 0 if step.chunks else streamed - stats.streamed_bytes
        stats.streamed_bytes, stats.running = streamed, len(self.scheduler.running)
        stats.kv_blocks_used = self.scheduler.pool.num_used

    def _forward(self, token_ids: Tensor, step: StepTokens) -> Tensor:
        """The last hidden states, [T, D]."""
        return self.model(token_ids, self.cache.around_step(self.model.ops.attend(self.model, self.cache, step), step))

    def _sample(self, logits: Tensor) -> None:
        """Append a token to slots 0..R-1. logits float32 [R, V], modified in place."""
        model, batch, rows = self.model, self.scheduler.batch, self.scheduler.batch.rows(len(logits))
        if batch.grammars.num_texts:  # the host finds the next masks while the model runs
            wait_for_steps(self.scheduler, wait_for_all=True)
        tokens, logprobs, processed_logprobs = model.ops.sample(logits, rows, batch.host_rows(len(logits)))
        model.tp.broadcast(tokens)
        if logprobs is not None:  # read back in every step, so what is planned is what there is
            batch.outputs.append_logprobs(logprobs, batch.planned[logprobs.rows])
        model.ops.post_update(tokens, rows, processed_logprobs)

    # A token for each row.

    def _run_decode(self, step: Step) -> None:
        batch, rows = self.scheduler.batch, step.num_decode
        # The host keeps some rows' log-probabilities, or finds their masks.
        captured = self.capture is not None and not batch.num_with_logprobs and not batch.grammars.num_texts
        # A captured step runs over free slots too, so that few sizes serve all.
        size = pad_to_capture_size(self.capture_sizes, rows) if captured else pad_rows(rows, self.model.ops.row_tile)
        width = self._width(rows)
        batch.upload()
        shared = self._find_shared(size)
        self.model.expert_load.set_num_valid(rows)
        queue = partial(self._decode, size if captured else rows, size, width, shared)
        for _ in range(step.num_steps):
            run = self.graphs.prepare((size, width), batch.tables(), queue) if captured else queue
            # Each step apart: gaps between them are no work.
            with self.device_clock.work("decode", size if captured else None):
                run()

    def _decode(self, rows: int, size: int, width: int, shared: object) -> None:
        """A token for slots 0..rows-1, in a step of `size` tokens; nothing here waits for the device."""
        batch = self.scheduler.batch
        decode = batch.decode_tokens(min(rows, batch.num_active), size, width)
        hidden = self._forward(batch.token[:size], StepTokens(size, decode, shared=shared))
        self._sample(self.model.logits(hidden)[:rows])

    def _width(self, rows: int) -> int:
        """Blocks of a row in the step's table: a power of two, so that a graph serves for a while."""
        batch = self.scheduler.batch
        return min(1 << (int(batch.num_blocks[:rows].max()) - 1).bit_length(), int(batch.block_table.shape[1]))

    def _find_shared(self, rows: int) -> object:
        model, batch = self.model, self.scheduler.batch
        table, prompt_tokens = batch.block_table[:rows], batch.prompt_tokens[:rows]
        return model.ops.find_shared(model, self.cache, table, prompt_tokens, batch.version)

    # Any tokens of any rows.

    def _run_ragged(self, step: Step) -> Callable[[], None] | None:
        """Generated tokens, of rows and then jump-forward ones; then prompt chunks. Returns as `_score`."""
        model, batch, stats = self.model, self.scheduler.batch, self.scheduler.stats
        rows, decode, shared = step.num_decode, None, None
        width, generated = self._width(rows) if rows else 0, batch.token[:rows]  # ids of generated tokens
        batch.upload()
        if step.num_jump_forward:
            decode, generated = append_jump_forward(batch, step.jump_forward, width)
            stats.jump_forward_tokens += step.num_jump_forward
            stats.completion_tokens += step.num_jump_forward
        elif rows:
            decode, shared = batch.decode_tokens(rows, rows, width), self._find_shared(rows)
        prompt_ids = [token_id for chunk in step.chunks for token_id in chunk.token_ids]
        size = pad_rows(step.num_tokens, model.ops.row_tile)
        ids = np.zeros(size - len(generated), np.int64)
        ids[: len(prompt_ids)] = prompt_ids
        token_ids = torch.cat((generated, async_copy_to_gpu(ids, generated.device)))
        model.expert_load.set_num_valid(step.num_tokens)
        with self.device_clock.work("prefill" if step.chunks else "decode"):
            hidden = self._forward(token_ids, StepTokens(size, decode, step.chunks, shared))
            if step.block_copies:
                self.cache.copy_blocks(*zip(*step.block_copies, strict=True))
            # The rows that decode, then one for each sample that starts, in the order of their slots.
            wanted = [*range(rows)]
            for chunk in step.chunks:
                wanted += [chunk.last] * len(chunk.request.samples) if chunk.is_last else []
            if wanted:
                self._sample(self._logits(hidden, wanted))
            scored = self._score(hidden, step)
        if step.chunks:
            stats.first_prefill_time = stats.first_prefill_time or time.time()
            stats.refills += bool(rows)
            stats.prompt_tokens += len(prompt_ids)
        return scored

    def _logits(self, hidden: Tensor, places: list[int]) -> Tensor:
        """Of some tokens [N] of hidden [T, D]: float32 [N, V]."""
        padded = np.resize(np.array(places), pad_rows(len(places), self.model.ops.row_tile))
        return self.model.logits(hidden[async_copy_to_gpu(padded, hidden.device)])[: len(places)]

    def _score(self, hidden: Tensor, step: Step) -> Callable[[], None] | None:
        """A function that waits for the log-probabilities of the step's choices, and of the end after each, and adds
        them to their requests. None where there are no choices."""
        places: list[int] = []  # in the step, of the token before
        wanted: list[list[int]] = []  # any of these tokens may follow
        owners: list[tuple[Request, int]] = []
        for chunk in step.chunks:
            request = chunk.request
            if chunk.choice is None or request.choices is None:
                continue
            following = [[token_id] for token_id in request.choices[chunk.choice]]
            first = chunk.last - len(following)
            following += [request.end_tokens] if request.end_tokens else []
            places += range(first, first + len(following))
            wanted += following
            owners += [(request, chunk.choice)] * len(following)
        if not owners:
            return None
        most, found = max(map(len, wanted)), []
        ids = np.array([[*tokens, *[-1] * (most - len(tokens))] for tokens in wanted])  # [N, most], -1: none
        for low in range(0, len(places), _LOGIT_ROWS):
            logits = self._logits(hidden, places[low : low + _LOGIT_ROWS])
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


@torch.inference_mode()
def run_largest_step(
    model: Mixtral, rows: int, prefill_tokens: int, kv_dtype: torch.dtype, block_size: int = BLOCK_SIZE
) -> None:
    """A token for `rows` rows of full length, sampled, and `prefill_tokens` prompt tokens, all in the scratch block."""
    device, max_model_len = model.weights.embedding.device, len(model.cos)
    width = -(-max_model_len // block_size)
    limits = EngineLimits(rows, rows + prefill_tokens, max_model_len, 1, block_size, model.ops.row_tile)
    make_batch = partial(InputBatch, model.config.vocab_size, (2,), None, AsyncCopy(device), None)
    scheduler = Scheduler(make_batch, limits, EngineStats())
    prompt = Prompt(0, "", {}, range(max_model_len), SamplingConfig(temperature=1.0, top_p=0.9))
    for number in range(rows):
        scheduler.batch.add(prompt, number, max_tokens=1)
    scheduler.batch.num_blocks[:rows] = width
    step, request, blocks = Step(rows), Request(prompt, []), [SCRATCH_BLOCK] * width
    for first in range(0, prefill_tokens, max_model_len):
        length = min(max_model_len, prefill_tokens - first)
        step.chunks.append(ScheduledChunk(rows + first, 0, length, blocks, request, [0] * length))
    runner = ModelRunner(model, KVCache(model.config, 1, block_size, kv_dtype, device), scheduler, capture=None)
    runner.run(step)
