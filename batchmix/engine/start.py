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
from batchmix.engine.device import check_model, choose_place, compute_dtype
from batchmix.engine.engine import PREFILL_CHUNK, Engine
from batchmix.engine.graphs import cuda_capture
from batchmix.engine.kv_cache import KVCache
from batchmix.engine.workspace import measure_workspace
from batchmix.guided.compile import Guides
from batchmix.memory import free_bytes, gpu_cache_bytes, keep_freed_memory, kv_blocks, workspace_bytes
from batchmix.model import torch_backend, torch_ops
from batchmix.model.backend import Operators
from batchmix.model.checkpoint import Checkpoint
from batchmix.model.mixtral import Mixtral
from batchmix.model.shards import ALONE, Shards
from batchmix.model.weights import Weights, load_weights

BLOCK_SIZE = 64  # tokens; decode's batched products run fastest on CPU at 32 to 64
MAX_NUM_SEQS_CPU = 256  # more rows hardly fill the matrix products better, and their cache outgrows the CPU's
MAX_NUM_SEQS_GPU = 1024  # 256 rows for each of Mixtral's 8 experts, about where products stop waiting for weights
# A row that has ended stays for 2.5 steps: half a window, and the next one, queued before its end is seen. What the host
# does between windows (benchmarks/bench_step.py) hides behind the window that runs. Not measured on a GPU.
STEPS_PER_READ_GPU = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """What the engine holds, chosen from memory."""

    max_num_seqs: int
    kv_blocks: int
    block_size: int
    workspace_bytes: int  # what the largest step takes beside weights and KV cache


def check_engine(checkpoint: Checkpoint, config: EngineConfig) -> None:
    """BatchmixError where this machine cannot run the checkpoint as asked; reads no weights."""
    place = choose_place(config)
    check_model(checkpoint.config, place)
    compute_dtype(checkpoint.dtype, place)


def start_engine(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    config: EngineConfig,
    should_stop: Callable[[], bool],
    shards: Shards = ALONE,
    guides: Guides | None = None,
) -> Engine:
    """Load the weights, give the memory that is left to the KV cache, and say so in one line.

    `guides`: those of this checkpoint and tokenizer, where some are compiled already.
    """
    started = time.perf_counter()
    place = choose_place(config)
    dtype, device = compute_dtype(checkpoint.dtype, place), place.device
    processes = shards.size * config.data_parallel_size
    if device.type == "cpu":
        keep_freed_memory()
        if processes > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    else:
        torch.cuda.set_device(device)  # kernels are launched on the current one
    weights = load_weights(checkpoint, dtype, device, shards)
    operators = open_backend(place.backend, config)
    model = Mixtral(shards.slice_config(checkpoint.config), weights, operators, checkpoint.max_model_len, shards)
    loaded = time.perf_counter()
    if place.backend is Backend.torch:
        _check_products(weights, max(PREFILL_CHUNK, config.max_num_batched_tokens))
    sizes = choose_sizes(model, checkpoint, config)
    cache = KVCache(model.config, sizes.kv_blocks + 1, sizes.block_size, dtype, device)
    rounded = "" if dtype is checkpoint.dtype else f" (weights rounded to {_name(checkpoint.dtype)})"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    _log.info(
        "%s in %s%s on %s%s%s: weights %.2f GiB in %.1f s, workspace %.2f GiB, KV cache %s tokens, %d rows at once",
        checkpoint.folder.name, _name(dtype), rounded, f"{processes} x " * (processes > 1), place.name, threads,
        weights.num_bytes() / 2**30, loaded - started, sizes.workspace_bytes / 2**30, f"{sizes.kv_blocks * sizes.block_size:,}", sizes.max_num_seqs,
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
        steps_per_read=1 if device.type == "cpu" else STEPS_PER_READ_GPU,
        capture=cuda_capture() if device.type == "cuda" and config.cuda_graphs else None,
        # torch's prefill rounds a prompt otherwise where it is cut, so a row would show whether others begin as it does.
        share_prefix=config.share_prefix and place.backend is Backend.triton,
        guides=guides or open_guides(checkpoint, tokenizer),
    )


def open_guides(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Guides | None:
    """The guides of a checkpoint's vocabulary; None without a tokenizer. Compiles nothing yet."""
    if tokenizer is None:
        return None
    return Guides.of(tokenizer, checkpoint.config.vocab_size, checkpoint.eos_token_ids)


def open_backend(backend: Backend, config: EngineConfig) -> Operators:
    """The operators of a backend."""
    if backend is Backend.torch:
        return torch_backend
    # Not at the top: triton takes a second to import, and a CPU-only machine may lack it.
    from batchmix.model.triton_ops import TritonOperators

    return TritonOperators(config.batch_invariant, config.share_prefix)


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


def choose_sizes(model: Mixtral, checkpoint: Checkpoint, config: EngineConfig) -> Sizes:
    """Rows and KV blocks that fit into the memory that is free now: on a GPU measured, on the CPU estimated."""
    device, dtype = model.weights.embedding.device, model.weights.embedding.dtype
    prefill_tokens = max(PREFILL_CHUNK, config.max_num_batched_tokens)
    if device.type == "cpu":
        rows = config.max_num_seqs or MAX_NUM_SEQS_CPU
        workspace = workspace_bytes(model.config, rows, prefill_tokens)
        processes = model.shards.size * config.data_parallel_size  # which share the memory
        free = int(free_bytes() // processes * config.gpu_memory_utilization) - workspace
    else:
        rows = config.max_num_seqs or MAX_NUM_SEQS_GPU
        workspace = measure_workspace(
            model, rows, prefill_tokens, checkpoint.max_model_len, BLOCK_SIZE, config.cuda_graphs
        )
        free = gpu_cache_bytes(*torch.cuda.mem_get_info(device), workspace, config.gpu_memory_utilization)
    block_bytes = KVCache.block_bytes(model.config, BLOCK_SIZE, dtype)
    blocks = model.shards.smallest(kv_blocks(free, block_bytes, -(-checkpoint.max_model_len // BLOCK_SIZE), rows))
    # Each row holds a block at least.
    return Sizes(config.max_num_seqs or min(rows, blocks), blocks, BLOCK_SIZE, workspace)


def stop_tables(tokenizer: Tokenizer, vocab_size: int) -> Callable[[SamplingConfig], StopTable]:
    """How a row's stop strings become an automaton over the model's vocabulary, which may be larger or smaller."""

    def build(sampling: SamplingConfig) -> StopTable:
        pieces = tokenizer.token_bytes(sampling.skip_special_tokens)[:vocab_size]
        pieces = pieces + [b""] * (vocab_size - len(pieces))
        return build_stop_table(sampling.stop or [], pieces, drops_leading_space=tokenizer.drops_leading_space)

    return build


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
