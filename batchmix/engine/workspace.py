"""How much memory the largest steps take, by running them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from batchmix.config import SamplingConfig
from batchmix.engine.async_copy import async_copy_from
from batchmix.engine.kv_cache import SCRATCH_BLOCK, KVCache
from batchmix.engine.slots import InputBatch
from batchmix.model.backend import Chunk
from batchmix.model.mixtral import Mixtral
from batchmix.records import Prompt


def measure_workspace(
    model: Mixtral,
    rows: int,
    prefill_tokens: int,
    max_model_len: int,
    block_size: int,
    graphs: bool,
    kv_dtype: torch.dtype,
) -> int:
    """Bytes that a GPU's largest step takes, and the memory that CUDA graphs of decode keep. Compiles kernels too."""
    prefill = _peak(model, lambda: largest_prefill(model, prefill_tokens, max_model_len, block_size, kv_dtype))
    decode = _peak(model, lambda: largest_decode(model, rows, max_model_len, block_size, kv_dtype))
    return max(prefill, decode) + decode * graphs


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
def largest_prefill(
    model: Mixtral, num_tokens: int, max_model_len: int, block_size: int, kv_dtype: torch.dtype
) -> None:
    """Prefill `num_tokens` tokens, all of them in the scratch block."""
    cache = _scratch(model, block_size, kv_dtype)
    scratch = [SCRATCH_BLOCK] * -(-max_model_len // block_size)
    chunks = [
        Chunk(offset, 0, min(max_model_len, num_tokens - offset), scratch)
        for offset in range(0, num_tokens, max_model_len)
    ]
    tile = model.ops.row_tile
    tokens = torch.zeros(-(-num_tokens // tile) * tile, dtype=torch.int64, device=cache.keys.device)
    model.expert_load.set_num_valid(num_tokens)
    model(tokens, model.ops.prefill(model, cache, chunks, len(tokens)))


@torch.inference_mode()
def largest_decode(model: Mixtral, rows: int, max_model_len: int, block_size: int, kv_dtype: torch.dtype) -> None:
    """A token for `rows` rows of full length, sampled, all of them in the scratch block."""
    ops, cache = model.ops, _scratch(model, block_size, kv_dtype)
    width = -(-max_model_len // block_size)
    slots = InputBatch(rows, model.config.vocab_size, width, (), None, async_copy_from(cache.keys.device), ops.row_tile)
    prompt = Prompt(0, "", {}, range(max_model_len), SamplingConfig(temperature=1.0, top_p=0.9))
    for sample in range(rows):
        slots.add(prompt, sample, max_tokens=1)
    slots.upload()
    model.expert_load.set_num_valid(rows)
    ops.find_shared(model, cache, slots, len(slots.token))
    hidden = model(slots.token, ops.decode(model, cache, slots, rows, len(slots.token), width))
    tensors = slots.rows(0, rows)
    tokens, *_ = ops.sample(model.logits(hidden)[:rows], tensors, slots.host_rows(0, rows))
    ops.post_update(tokens, tensors)


def _scratch(model: Mixtral, block_size: int, kv_dtype: torch.dtype) -> KVCache:
    """A cache of the scratch block alone."""
    return KVCache(model.config, 1, block_size, kv_dtype, model.weights.embedding.device)
