"""How much memory the largest steps take, by running them."""

from __future__ import annotations

import torch

from batchmix.engine.kv_cache import SCRATCH_BLOCK, KVCache
from batchmix.engine.slots import RUNNING, Slots
from batchmix.model.backend import Chunk
from batchmix.model.mixtral import Mixtral


def measure_workspace(model: Mixtral, rows: int, prefill_tokens: int, max_model_len: int, block_size: int) -> int:
    """Bytes that the GPU's largest prefill and decode steps take beside what is allocated now. Compiles kernels too."""
    device = model.weights.embedding.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    largest_steps(model, rows, prefill_tokens, max_model_len, block_size)
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()  # so that what is free now is what the KV cache may have
    return taken


@torch.inference_mode()
def largest_steps(model: Mixtral, rows: int, prefill_tokens: int, max_model_len: int, block_size: int) -> None:
    """Prefill `prefill_tokens` tokens, then decode `rows` rows of full length. All of them lie in the scratch block."""
    weights, ops = model.weights, model.ops
    device = weights.embedding.device
    cache = KVCache(model.config, 1, block_size, weights.embedding.dtype, device)
    blocks_per_row = -(-max_model_len // block_size)
    scratch = [SCRATCH_BLOCK] * blocks_per_row
    chunks = [
        Chunk(offset, 0, min(max_model_len, prefill_tokens - offset), scratch)
        for offset in range(0, prefill_tokens, max_model_len)
    ]
    tile = ops.row_tile
    tokens = torch.zeros(-(-prefill_tokens // tile) * tile, dtype=torch.int64, device=device)
    model(tokens, ops.prefill(model, cache, chunks, len(tokens)))
    slots = Slots(rows, model.config.vocab_size, blocks_per_row, (), None, device, tile)
    slots.host["finish"][:rows] = RUNNING
    slots.host["context"][:rows] = max_model_len - 1
    slots.host["temperature"][:rows] = 1.0
    slots.host["top_p"][:rows] = 0.9
    slots.num_blocks[:rows] = blocks_per_row
    slots.upload()
    hidden = model(slots.token, ops.decode(model, cache, slots, rows, len(slots.token)))
    tokens, _ = ops.choose(model.logits(hidden)[:rows], slots, 0)
    ops.advance(slots, 0, tokens, True)
