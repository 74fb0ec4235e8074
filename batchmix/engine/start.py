"""From a checkpoint to an engine that fits the memory there is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from batchmix.config import Backend, EngineConfig, SamplingConfig
from batchmix.data.stop_strings import StopTable, build_stop_table
from batchmix.data.tokenizer import Tokenizer
from batchmix.engine.engine import PREFILL_CHUNK, Engine
from batchmix.engine.kv_cache import KVCache
from batchmix.errors import BatchmixError
from batchmix.memory import free_bytes, keep_freed_memory, kv_blocks, workspace_bytes
from batchmix.model import torch_backend, torch_ops
from batchmix.model.checkpoint import Checkpoint
from batchmix.model.mixtral import Mixtral
from batchmix.model.weights import Weights, load_weights

BLOCK_SIZE = 64  # tokens; decode's batched products run fastest on CPU at 32 to 64
MAX_NUM_SEQS_CPU = 256  # more rows hardly fill the matrix products better, and their cache outgrows the CPU's

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """What the engine holds, chosen from memory."""

    max_num_seqs: int
    kv_blocks: int
    block_size: int


def check_engine(engine: EngineConfig) -> None:
    """BatchmixError where the device or backend asked for cannot be had; reads no weights."""
    if engine.backend is Backend.triton:
        raise BatchmixError("engine.backend=triton: not available in this version; use engine.backend=torch")
    if engine.device not in ("auto", "cpu"):
        raise BatchmixError(f"engine.device={engine.device}: this version runs on the CPU only; use engine.device=cpu")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype weights of `dtype` are kept and multiplied on this machine.

    A CPU without bfloat16 or float16 matrix instructions multiplies those seven times slower than float32 (measured
    on an AVX2 machine), so there the weights are rounded to `dtype` and kept in float32.
    """
    needed = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}.get(dtype)
    there = torch.cpu.get_capabilities()
    return dtype if needed is None or any(there.get(name) for name in needed) else torch.float32


def start_engine(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, config: EngineConfig, should_stop: Callable[[], bool]
) -> Engine:
    """Load the weights, give the memory that is left to the KV cache, and say so in one line."""
    started = time.perf_counter()
    keep_freed_memory()
    dtype, device = compute_dtype(checkpoint.dtype), torch.device("cpu")
    weights = load_weights(checkpoint, dtype, device)
    model = Mixtral(checkpoint.config, weights, torch_backend, checkpoint.max_model_len)
    _check_products(weights, max(PREFILL_CHUNK, config.max_num_batched_tokens))
    sizes = choose_sizes(checkpoint, config, dtype)
    cache = KVCache(checkpoint.config, sizes.kv_blocks + 1, sizes.block_size, dtype, device)
    rounded = "" if dtype is checkpoint.dtype else f" (weights rounded to {_name(checkpoint.dtype)})"
    _log.info(
        "%s in %s%s on cpu, %d threads: weights %.2f GiB in %.1f s, KV cache %s tokens, %d rows at once",
        checkpoint.folder.name, _name(dtype), rounded, torch.get_num_threads(), weights.num_bytes() / 2**30,
        time.perf_counter() - started, f"{sizes.kv_blocks * sizes.block_size:,}", sizes.max_num_seqs,
    )  # fmt: skip
    return Engine(
        model,
        cache,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=checkpoint.max_model_len,
        eos_token_ids=checkpoint.eos_token_ids,
        stop_table=None if tokenizer is None else stop_tables(tokenizer, checkpoint.config.vocab_size),
        should_stop=should_stop,
    )


def _check_products(weights: Weights, max_rows: int) -> None:
    """Warn where this machine's matrix library gives a row other bits in other company, which we cannot mend."""
    layer = weights.layers[0]
    products = {"wqkv": layer.wqkv, "wo": layer.wo, "router": layer.router, "w13": layer.w13[0], "w2": layer.w2[0],
                "lm_head": weights.lm_head}  # fmt: skip
    unsteady = [name for name, weight in products.items() if not torch_ops.products_keep_their_bits(weight, max_rows)]
    if unsteady:
        _log.warning(
            "this machine's matrix products with %s round a row differently in other company: answers may depend on the"
            " batch size; with fewer threads (OMP_NUM_THREADS) they may not", ", ".join(unsteady),
        )  # fmt: skip


def choose_sizes(checkpoint: Checkpoint, config: EngineConfig, dtype: torch.dtype) -> Sizes:
    """Rows and KV blocks that fit into the memory that is free now."""
    rows = config.max_num_seqs or MAX_NUM_SEQS_CPU
    workspace = workspace_bytes(checkpoint.config, rows, max(PREFILL_CHUNK, config.max_num_batched_tokens))
    free = int(free_bytes() * config.gpu_memory_utilization) - workspace
    block_bytes = KVCache.block_bytes(checkpoint.config, BLOCK_SIZE, dtype)
    blocks = kv_blocks(free, block_bytes, -(-checkpoint.max_model_len // BLOCK_SIZE), rows)
    return Sizes(rows, blocks, BLOCK_SIZE)


def stop_tables(tokenizer: Tokenizer, vocab_size: int) -> Callable[[SamplingConfig], StopTable]:
    """How a row's stop strings become an automaton over the model's vocabulary, which may be larger or smaller."""

    def build(sampling: SamplingConfig) -> StopTable:
        pieces = tokenizer.token_bytes(sampling.skip_special_tokens)[:vocab_size]
        pieces = pieces + [b""] * (vocab_size - len(pieces))
        return build_stop_table(sampling.stop or [], pieces, drops_leading_space=tokenizer.drops_leading_space)

    return build


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
