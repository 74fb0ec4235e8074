"""How much memory the largest steps take, by running them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from batchmix.config import SamplingConfig
from batchmix.engine.input_batch import InputBatch
from batchmix.engine.model_runner import pad, sample
from batchmix.model.async_copy import async_copy_from
from batchmix.model.backend import PrefillChunk, StepTokens
from batchmix.model.kv_cache import BLOCK_SIZE, SCRATCH_BLOCK, KVCache
from batchmix.model.mixtral import Mixtral
from batchmix.records import Prompt


def measure_workspace(
    model: Mixtral, rows: int, prefill_tokens: int, max_model_len: int, graphs: bool, kv_dtype: torch.dtype
) -> int:
    """Bytes that a GPU's largest step takes, and the memory that CUDA graphs of decode keep. Compiles kernels too."""
    step = partial(run_step, model, rows, max_model_len=max_model_len, kv_dtype=kv_dtype)
    largest = _peak(model, partial(step, prefill_tokens))
    return largest + (_peak(model, partial(step, 0)) if graphs else 0)


def _peak(model: Mixtral, step: Callable[[], None]) -> int:
    """Bytes that a step takes beside what is allocated now."""
    device = model.weights.embedding.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()  # so that what is free afterwards is what the KV cache may have
    return taken


@torch.inference_mode()
def run_step(
    model: Mixtral,
    rows: int,
    prefill_tokens: int,
    max_model_len: int,
    kv_dtype: torch.dtype,
    block_size: int = BLOCK_SIZE,
) -> None:
    """A token for `rows` rows of full length, sampled, and `prefill_tokens` prompt tokens, all in the scratch block."""
    device, ops = model.weights.embedding.device, model.ops
    cache = KVCache(model.config, 1, block_size, kv_dtype, device)
    width = -(-max_model_len // block_size)
    batch = InputBatch(rows, model.config.vocab_size, width, (2,), None, async_copy_from(device), ops.row_tile)
    prompt = Prompt(0, "", {}, range(max_model_len), SamplingConfig(temperature=1.0, top_p=0.9))
    for number in range(rows):
        batch.add(prompt, number, max_tokens=1)
    batch.upload()
    chunks = [
        PrefillChunk(rows + offset, 0, min(max_model_len, prefill_tokens - offset), [SCRATCH_BLOCK] * width)
        for offset in range(0, prefill_tokens, max_model_len)
    ]
    size, decode = pad(rows + prefill_tokens, ops.row_tile), batch.decode_tokens(rows, rows, width)
    shared = ops.find_shared(model, cache, batch.block_table[:rows], batch.prompt_tokens[:rows], batch.version)
    model.expert_load.set_num_valid(rows + prefill_tokens)
    token_ids = torch.zeros(size, dtype=torch.int64, device=device)
    hidden = model(token_ids, ops.attend(model, cache, StepTokens(size, decode, chunks, shared)))
    sample(model, batch, model.logits(hidden[: pad(rows, ops.row_tile)])[:rows])
