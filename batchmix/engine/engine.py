"""The engine: batches of prompts in, completions out.

`Engine.generate` is the whole loop: schedule a step, run it, process what the steps before have done. A step takes a
token of every running row and as many prompt tokens as its budget leaves. An ended row's slot is refilled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from batchmix.engine.cuda_graphs import Capture
from batchmix.engine.input_batch import InputBatch
from batchmix.engine.jump_forward import find_jump_forward
from batchmix.engine.model_runner import ModelRunner
from batchmix.engine.output_processor import process_outputs
from batchmix.engine.request import EngineLimits, Request
from batchmix.engine.scheduler import Scheduler
from batchmix.errors import BatchmixError
from batchmix.models.kv_cache import KVCache
from batchmix.models.mixtral import Mixtral
from batchmix.observability.clock import StageClock
from batchmix.observability.engine_stats import EngineStats
from batchmix.records import Batch, Completion, Prompt
from batchmix.structured_output.compile import GrammarCompiler

_log = logging.getLogger(__name__)


class Engine:
    """Runs prompts through the model, `limits.max_num_seqs` rows at a time."""

    def __init__(
        self,
        model: Mixtral,
        cache: KVCache,
        limits: EngineLimits,
        make_batch: Callable[[EngineLimits], InputBatch],
        *,
        should_stop: Callable[[], bool] = lambda: False,
        capture: Capture | None = None,
        grammars: GrammarCompiler | None = None,
        stats: EngineStats | None = None,
    ) -> None:
        """`capture` makes a CUDA graph of a step. `stats`: those in which the start of the engine was counted."""
        if (cache.num_blocks - 1) * cache.block_size < limits.max_model_len:
            raise ValueError(f"{cache.num_blocks - 1} KV blocks cannot hold one row of {limits.max_model_len} tokens")
        self.model, self.cache, self.grammars, self.should_stop = model, cache, grammars, should_stop
        model.expert_load.reset()
        self.stats = stats or EngineStats()
        self.stats.kv_blocks_total = cache.num_blocks - 1
        self.clock = StageClock()
        self.scheduler = Scheduler(make_batch, limits, self.stats)
        self.runner = ModelRunner(model, cache, self.scheduler, capture)

    @torch.inference_mode()
    def generate(self, batches: Iterable[Batch]) -> Iterator[Completion]:
        """Run every prompt of every batch; completions come out as rows end. Stops early when `should_stop()`.

        Under tensor parallelism every rank runs this on the same batches, so nothing here may be decided by a clock.
        """
        scheduler = self.scheduler
        batches, more = iter(batches), True
        while not self.should_stop():
            while more and len(scheduler.waiting) < scheduler.batch.capacity:
                batch = next(batches, None)
                more = batch is not None
                if batch is not None and not batch.prompts:  # those on their way take all the memory that they may
                    break
                yield from self.enqueue(batch.prompts if batch is not None else ())
            if scheduler.is_idle and not more:
                return
            yield from self.step()
        yield from process_outputs(scheduler, wait_for_all=True)

    def enqueue(self, prompts: Iterable[Prompt]) -> Iterator[Completion]:
        """Let prompts wait for a slot; those that cannot run come out at once."""
        for prompt in prompts:
            if prompt.error is not None:
                yield Completion.failed(prompt, prompt.error)
                continue
            request = Request(prompt, list(prompt.samples or range(prompt.sampling.n)))
            if (structured := prompt.sampling.structured_outputs) is not None:
                assert self.grammars is not None, "rows with structured_outputs are refused where there is no tokenizer"
                if structured.score_choices:
                    request.choices = self.grammars.choice_tokens(prompt.sampling)
                    request.end_tokens = self.grammars.end_tokens(prompt.sampling)
                else:
                    self.stats.rows_guided[self.grammars.get(prompt.sampling).kind] += 1
            self.scheduler.add(request)

    def step(self) -> list[Completion]:
        """Schedule a step, queue it, and process what the steps before it have done. Where the device has no memory, go
        on with half the batch."""
        scheduler, batch = self.scheduler, self.scheduler.batch
        depends_on_last = batch.num_with_logprobs or batch.grammars.num_forced
        completions = process_outputs(scheduler, wait_for_all=True) if depends_on_last else []
        most = scheduler.limits.max_num_batched_tokens
        jump_forward = find_jump_forward(batch, most) if batch.grammars.num_forced else []
        reads_each_step = jump_forward or batch.num_with_logprobs or batch.grammars.num_texts
        step = scheduler.schedule(jump_forward, 1 if reads_each_step else scheduler.limits.steps_per_read)
        if step is None:  # before the next one all that is queued has to be read
            return completions + process_outputs(scheduler, wait_for_all=True)
        name = "prefill" if step.chunks else "decode"
        try:
            with self.clock.stage(name):
                self.runner.run(step)
                return completions + process_outputs(scheduler, wait_for_all=False)
        except torch.OutOfMemoryError:
            pass  # what the step held is freed with the traceback, so before it is tried again
        self._retry_with_half_the_batch(name)
        return completions

    def _retry_with_half_the_batch(self, name: str) -> None:
        """Let every row wait again, and go on with half as many. Rows, keyed as they are, end the same."""
        scheduler, limits = self.scheduler, self.scheduler.limits
        capacity, batched = limits.max_num_seqs, limits.max_num_batched_tokens
        if self.model.tp.size > 1:  # the other ranks know nothing of it
            raise BatchmixError(
                f"out of memory in a {name} step with {capacity} rows at once, on one of several ranks;"
                " lower engine.max_num_seqs or engine.gpu_memory_utilization"
            )
        if capacity == 1 and batched <= limits.prefill_chunk:
            raise BatchmixError(
                "out of memory with one row at a time; lower engine.gpu_memory_utilization or model.max_model_len"
            )
        self.stats.completion_tokens -= int(scheduler.batch.outputs.count[: scheduler.batch.num_active].sum())
        rows = scheduler.requeue_all()
        batched_now, capacity_now = max(limits.prefill_chunk, batched // 2), max(1, capacity // 2)
        scheduler.renew(replace(limits, max_num_seqs=capacity_now, max_num_batched_tokens=batched_now))
        self.runner.renew()
        if self.cache.keys.is_cuda:
            torch.cuda.empty_cache()
        self.stats.out_of_memory += 1
        self.stats.running, self.stats.waiting = 0, len(scheduler.waiting)
        _log.warning(
            "out of memory in a %s step: %d rows wait again; going on with %d rows at once (was %d) and %s tokens in a"
            " step (was %s)", name, rows, capacity_now, capacity, f"{batched_now:,}", f"{batched:,}",
        )  # fmt: skip

    def abort(self) -> None:
        """Drop every request, those in the middle of a step too; `generate` may be called again."""
        scheduler = self.scheduler
        scheduler.waiting.clear()
        scheduler.renew(scheduler.limits)
        self.runner.renew()
        self.stats.running = self.stats.waiting = self.stats.kv_blocks_used = 0

    def read_totals(self) -> float | None:
        """Read the device's totals into `stats`, waiting for it. The seconds that it worked; None on a CPU."""
        clock, stats = self.runner.device_clock, self.stats
        seconds = clock.seconds()
        stats.expert_tokens = self.model.expert_load.counts.tolist()
        stats.decode_steps = clock.steps()
        if stats.decode_steps:
            steps = stats.decode_steps.items()
            sizes = ", ".join(f"{size}: {count:,.0f} of {took / count * 1e3:.1f} ms" for size, (count, took) in steps)
            _log.info(
                "decode steps by captured size: %s; %d graphs captured in %.1f s, %d kernels compiled in %.1f s during"
                " the run",
                sizes, stats.graphs_captured, stats.capture_seconds, stats.kernels_compiled, stats.compile_seconds,
            )  # fmt: skip
        return seconds
