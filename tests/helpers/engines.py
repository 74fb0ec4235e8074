"""Engines on small random checkpoints, and rows to run through them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.checkpoints.loading import load_weights
from batchmix.dtypes import Dtype, Quantization
from batchmix.engine.engine import Engine
from batchmix.engine.input_batch import InputBatch
from batchmix.engine.request import EngineLimits
from batchmix.models import torch_backend
from batchmix.models.async_copy import AsyncCopy, CopyEvent
from batchmix.models.backend import Operators
from batchmix.models.kv_cache import KVCache
from batchmix.models.mixtral import Mixtral
from batchmix.models.step_tokens import PrefillChunk, StepTokens
from batchmix.models.torch_products import pad_rows
from batchmix.offload.expert_stream import ExpertStream, Offload
from batchmix.offload.staged_cache import StagedKVCache
from batchmix.offload.transfer_stream import TransferStream
from batchmix.planning.planner import Limits, plan
from batchmix.prompts.stop_strings import StopTable
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig

torch.set_num_threads(1)  # products this small are slower on two threads, many times so on a busy machine


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    max_model_len: int = 512,
    operators: Operators = torch_backend,
    quantization: Quantization | None = None,
    offload: Offload | None = None,
) -> Mixtral:
    name = Dtype[str(dtype).removeprefix("torch.")]
    checkpoint = open_checkpoint(ModelConfig(path=str(folder), dtype=name, quantization=quantization))
    on_gpu = operators is not torch_backend and torch.cuda.is_available()
    weights = load_weights(checkpoint, dtype, torch.device("cuda" if on_gpu else "cpu"), allocation=offload)
    stream = ExpertStream(weights.layers, offload) if offload is not None and offload.streamed else None
    return Mixtral(checkpoint.config, weights, operators, max_model_len, stream=stream)


def make_engine(model: Mixtral, host: TransferStream | None = None, **options: Any) -> Engine:
    """An engine of 16-token blocks; `kv_blocks` of them, of `kv_dtype`, on the `host` where there is one."""
    blocks = options.pop("kv_blocks", 2000)
    block_size = options.pop("block_size", 16)
    embedding = model.weights.embedding
    kv_dtype = options.pop("kv_dtype", embedding.dtype)
    cache = (
        KVCache(model.config, blocks + 1, block_size, kv_dtype, embedding.device)
        if host is None
        else StagedKVCache(model.config, blocks + 1, block_size, kv_dtype, host, 1024)
    )
    limits = EngineLimits(32, 512, 512, blocks + 1, block_size, model.ops.row_tile, model.ops.cuts_prompts)
    limited = {field.name: options.pop(field.name) for field in fields(EngineLimits) if field.name in options}
    eos_token_ids, stop_table = options.pop("eos_token_ids", (2,)), options.pop("stop_table", None)
    async_copy = options.pop("async_copy", None) or AsyncCopy(embedding.device)
    make_batch = partial(
        InputBatch, model.config.vocab_size, eos_token_ids, stop_table, async_copy, options.get("grammars")
    )
    return Engine(model, cache, replace(limits, **limited), make_batch, **options)


class LateAsyncCopy(AsyncCopy):
    """As from a GPU, on the CPU: what is read back is rubbish until it is waited for, and the host's looks are counted."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.late = True
        self.num_queued = 0
        self.queued_behind: list[int] = []  # at each wait: how many later windows the device had been given by then

    def to_host(self, tensors: Sequence[torch.Tensor]) -> CopyEvent:
        number = self.num_queued
        self.num_queued += 1
        copies = [tensor.clone().numpy() for tensor in tensors]
        seen = [np.full_like(copy, 99) for copy in copies]

        def wait() -> list[np.ndarray]:
            self.queued_behind.append(self.num_queued - 1 - number)
            for array, copy in zip(seen, copies, strict=True):
                array[:] = copy
            return seen

        return wait


def make_batch(
    rows: int, vocab_size: int, eos_token_ids: Sequence[int], stop_table: Callable[[SamplingConfig], StopTable] | None
) -> InputBatch:
    """Slots for rows of at most 64 tokens, on the CPU."""
    limits = EngineLimits(rows, 512, 64, 1, 16)
    return InputBatch(vocab_size, eos_token_ids, stop_table, AsyncCopy(torch.device("cpu")), None, limits)


def prompts(count: int, vocab_size: int, seed: int = 0, longest: int = 100, **sampling: Any) -> list[Prompt]:
    """Rows of random ids and ragged lengths."""
    source = random.Random(seed)
    settings = SamplingConfig(**{"max_tokens": 12, "temperature": 0.0, **sampling})
    return [
        Prompt(
            row,
            f"row-{row}",
            {},
            [source.randrange(3, vocab_size) for _ in range(source.randint(1, longest))],
            settings,
        )
        for row in range(count)
    ]


def run(engine: Engine, rows: Sequence[Prompt], sort_window: int = 1000) -> dict[tuple[str, int], Completion]:
    """All completions by (row id, sample)."""
    scheduler = engine.scheduler
    limits = Limits(
        scheduler.batch.capacity, scheduler.pool.num_blocks, scheduler.block_size, sort_window,
        share_prefix=scheduler.limits.share_prefix,
    )  # fmt: skip
    found = list(engine.generate(plan(rows, limits)))
    by_key = {(completion.prompt.id, completion.sample_index): completion for completion in found}
    assert len(by_key) == len(found), "a sample came out twice"
    assert scheduler.pool.num_used == scheduler.pool.num_only_kept, "blocks were not returned"
    assert scheduler.batch.num_active == 0
    return by_key


def answers(completions: dict[tuple[str, int], Completion]) -> dict[tuple[str, int], tuple[Any, ...]]:
    """What must not depend on company: tokens, the reason they ended and their log-probabilities, bit by bit."""
    return {
        key: (list(c.token_ids), c.finish_reason, c.stop_reason, c.num_tokens, c.cumulative_logprob, c.logprobs)
        for key, c in completions.items()
    }


def tokens_of(completions: dict[tuple[str, int], Completion]) -> dict[tuple[str, int], tuple[Any, ...]]:
    """What must not depend on the backend: tokens, why they ended, and why there are none."""
    return {key: (list(c.token_ids), c.finish_reason, c.error) for key, c in completions.items()}


@torch.inference_mode()
def packed_logits(model: Mixtral, rows: list[list[int]], **options: Any) -> list[torch.Tensor]:
    """Logits of every position of every row, all rows in one packed step."""
    engine = make_engine(model, **options)
    total = sum(map(len, rows))
    tokens, chunks, start = np.zeros(pad_rows(total, model.ops.row_tile), np.int64), [], 0
    for row in rows:
        tokens[start : start + len(row)] = row
        blocks = engine.scheduler.pool.take(-(-len(row) // engine.cache.block_size))
        chunks.append(PrefillChunk(start, 0, len(row), blocks))
        start += len(row)
    hidden = model(
        torch.from_numpy(tokens).to(model.weights.embedding.device),
        model.ops.attend(model, engine.cache, StepTokens(len(tokens), None, chunks)),
    )
    return list(model.logits(hidden)[:total].cpu().split([len(row) for row in rows]))


class ShortOfMemory:
    """The torch backend, whose `operator` fails at its n-th calls as torch does on a GPU that is full."""

    def __init__(self, operator: str, calls: set[int]) -> None:
        self.operator, self.calls, self.count = operator, calls, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch_backend, name)
        if name != self.operator:
            return found

        def run(*arguments: Any) -> Any:
            self.count += 1
            if self.count in self.calls:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found(*arguments)

        return run
