"""From a checkpoint to an engine that fits the memory there is."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial

import torch

from batchmix.checkpoints.checkpoint import Checkpoint
from batchmix.checkpoints.loading import load_weights
from batchmix.dtypes import KVCacheDtype, dtype_name
from batchmix.engine.config import CPU_BACKENDS, Backend, EngineConfig
from batchmix.engine.cuda_graphs import cuda_capture
from batchmix.engine.device import DevicePlan, check_model, compute_dtype, select_device
from batchmix.engine.engine import Engine
from batchmix.engine.input_batch import InputBatch
from batchmix.engine.model_runner import run_largest_step
from batchmix.engine.request import PREFILL_CHUNK, EngineLimits
from batchmix.errors import BatchmixError
from batchmix.memory import free_bytes, keep_freed_memory
from batchmix.models import numba_cache, torch_backend, torch_ops, torch_products
from batchmix.models.async_copy import AsyncCopy
from batchmix.models.backend import Operators
from batchmix.models.kv_cache import BLOCK_SIZE, KVCache
from batchmix.models.mixtral import Mixtral
from batchmix.models.numba_ops import NumbaOperators
from batchmix.models.quantized import FP8, Weight
from batchmix.models.tensor_parallel import SINGLE_RANK, TensorParallel
from batchmix.models.weights import Weights
from batchmix.observability.engine_stats import EngineStats
from batchmix.offload.expert_stream import ExpertStream, Offload, spread
from batchmix.offload.setup import open_transfer_stream, plan_offload
from batchmix.offload.staged_cache import StagedKVCache
from batchmix.offload.transfer_stream import TransferStream
from batchmix.planning.cost import footprint
from batchmix.planning.memory import gpu_cache_bytes, kv_blocks, workspace_bytes
from batchmix.planning.placement import BUFFERS, RESIDENT_ROWS, Placement
from batchmix.prompts.stop_strings import StopTable, build_stop_table
from batchmix.prompts.tokenizer import Tokenizer, vocabulary_bytes
from batchmix.sampling import SamplingConfig
from batchmix.structured_output.compile import GrammarCompiler, open_grammars

MAX_NUM_SEQS_CPU = 256  # more rows hardly fill the matrix products better, and their cache outgrows the CPU's
# A row that has ended stays for 2.5 steps: half a window, and the next one, queued before its end is seen. What the
# host does between windows (benchmarks/bench_step.py) hides behind the window that runs. Not measured on a GPU.
STEPS_PER_READ_GPU = 2

_log = logging.getLogger(__name__)


def check_engine(checkpoint: Checkpoint, config: EngineConfig) -> None:
    """BatchmixError where this machine cannot run the checkpoint as asked; reads no weights."""
    place = select_device(config)
    check_model(checkpoint.config, place, checkpoint.quantization)
    dtype = compute_dtype(checkpoint.dtype, place)
    if config.backend is Backend.numba and dtype not in numba_cache.DTYPES:
        raise BatchmixError(f"engine.backend=numba: has no kernels for {dtype_name(dtype)}; use engine.backend=torch")


def start_engine(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    config: EngineConfig,
    should_stop: Callable[[], bool],
    tp: TensorParallel = SINGLE_RANK,
    grammars: GrammarCompiler | None = None,
) -> Engine:
    """Load the weights and give the memory that is left to the KV cache. `grammars`: those compiled already."""
    started = time.perf_counter()
    place = select_device(config)
    dtype, device = compute_dtype(checkpoint.dtype, place), place.device
    kv_dtype, prefill_tokens = cache_dtype(checkpoint, dtype), max(PREFILL_CHUNK, config.max_num_batched_tokens)
    processes = tp.size * config.data_parallel_size
    if device.type == "cpu":
        keep_freed_memory()
        if processes > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    else:
        torch.cuda.set_device(device)  # kernels are launched on the current one
    sliced = tp.slice_config(checkpoint.config)
    link = open_transfer_stream(device, processes, checkpoint.offload_dir)
    plan, offload, rows = None, None, config.max_num_seqs or MAX_NUM_SEQS_CPU
    if link is not None:
        plan = plan_offload(checkpoint, config, link, place.name, prefill_tokens, (dtype, kv_dtype), tp)
        rows = config.max_num_seqs or (plan.max_num_seqs if plan else RESIDENT_ROWS)
        offload = Offload(link, spread(plan.streamed, sliced.num_hidden_layers)) if plan else None
    compile_ahead, stats = None, EngineStats()
    if device.type == "cuda":
        from batchmix.engine.compile_ahead import CompileAhead, CompileClock, Steps
        from batchmix.kernels.gpu import current_gpu

        CompileClock(stats)  # Triton keeps it
        if tp.rank == 0:  # the others' kernels are the same
            steps = Steps(sliced, dtype, kv_dtype, checkpoint.quantization, rows, prefill_tokens,
                          checkpoint.max_model_len, config.batch_invariant, config.share_prefix)  # fmt: skip
            cpus = max(1, (os.cpu_count() or 1) // config.data_parallel_size)  # of engines that start at once
            compile_ahead = CompileAhead(steps, current_gpu(device), cpus)
    weights = load_weights(checkpoint, dtype, device, tp, offload)
    stream = ExpertStream(weights.layers, offload) if offload is not None and offload.streamed else None
    model = Mixtral(sliced, weights, open_backend(place.backend, config, dtype), checkpoint.max_model_len, tp, stream)
    loaded = time.perf_counter()
    if compile_ahead is not None:
        compile_ahead.finish()
    if device.type == "cuda":
        tp.all_reduce_min(0)  # where the others wait for the kernels
    if place.backend in CPU_BACKENDS:
        if config.backend is Backend.auto and (reason := numba_cache.unavailable()):
            _log.info("torch's operators run, slower than the CPU kernels: %s", reason)
        prepacked = weights.can_be_prepacked() if offload is None else set[str]()
        _check_products(weights, config, rows, prefill_tokens, prepacked)
        weights.prepack(prepacked)
    workspace, num_blocks = _measure_memory(model, checkpoint, config, link, plan, rows, prefill_tokens, kv_dtype)
    rows = config.max_num_seqs or min(rows, num_blocks)  # each holds a block at least
    if link is not None and plan is not None and plan.kv_on_host:
        step = prefill_tokens + rows
        cache: KVCache = StagedKVCache(sliced, num_blocks + 1, BLOCK_SIZE, kv_dtype, link, step)
    else:
        cache = KVCache(sliced, num_blocks + 1, BLOCK_SIZE, kv_dtype, device)
    limits = EngineLimits(
        rows, config.max_num_batched_tokens, checkpoint.max_model_len, cache.num_blocks, cache.block_size,
        model.ops.row_tile, model.ops.cuts_prompts,
        # torch's prefill rounds a prompt otherwise where it is cut, so a row would show what others begin with.
        share_prefix=config.share_prefix and place.backend is Backend.triton,
        # A step with streamed weights takes as long as many others, and a staged cache needs to know where each row is.
        steps_per_read=1 if device.type == "cpu" or plan is not None else STEPS_PER_READ_GPU,
    )  # fmt: skip
    _log.info(_start_line(checkpoint, place, processes, model, cache, rows, workspace, plan, loaded - started))
    vocab_size = checkpoint.config.vocab_size
    eos_token_ids = checkpoint.end_tokens(None if tokenizer is None else tokenizer.eos_id)
    grammars = grammars or open_grammars(tokenizer, vocab_size, eos_token_ids)
    stop_table = None if tokenizer is None else partial(_stop_table, tokenizer, vocab_size)
    return Engine(
        model,
        cache,
        limits,
        partial(InputBatch, vocab_size, eos_token_ids, stop_table, AsyncCopy(device), grammars),
        should_stop=should_stop,
        # No graphs where weights are streamed: the host has to begin each copy.
        capture=cuda_capture() if device.type == "cuda" and config.cuda_graphs and plan is None else None,
        grammars=grammars,
        stats=stats,
    )


def _start_line(
    checkpoint: Checkpoint, place: DevicePlan, processes: int, model: Mixtral, cache: KVCache, rows: int,
    workspace: int, plan: Placement | None, seconds: float,
) -> str:  # fmt: skip
    """What runs where, and what it takes."""
    dtype = model.weights.embedding.dtype
    weights = f"weights {model.weights.num_bytes() / 2**30:.2f} GiB"
    if plan is not None:
        size = footprint(model.config, dtype.itemsize, checkpoint.quantization)
        weights += f"{plan.streamed_text(size)} at {plan.link_bandwidth / 1e9:.3g} GB/s, no CUDA graphs,"
    return "".join([
        f"{checkpoint.folder.name} in {dtype_name(dtype)}",
        "" if dtype is checkpoint.dtype else f" (weights rounded to {dtype_name(checkpoint.dtype)})",
        "" if checkpoint.quantization is None else f", experts in {checkpoint.quantization.value}",
        f" on {f'{processes} x ' * (processes > 1)}{place.name}",
        f", {torch.get_num_threads()} threads" if place.device.type == "cpu" else "",
        f", {'numba kernels' if isinstance(model.ops, NumbaOperators) else 'torch operators'}"
        if place.backend in CPU_BACKENDS else "",
        f": {weights} in {seconds:.1f} s, workspace {workspace / 2**30:.2f} GiB,"
        f" KV cache {(cache.num_blocks - 1) * cache.block_size:,} tokens",
        " in fp8" if cache.keys.dtype is FP8 else "",
        " on the host" if plan is not None and plan.kv_on_host else "",
        f", {rows} rows at once",
    ])  # fmt: skip


def open_backend(backend: Backend, config: EngineConfig, dtype: torch.dtype) -> Operators:
    """The operators of a backend. There are no CPU kernels for float16."""
    if backend is Backend.numba and dtype in numba_cache.DTYPES:
        return NumbaOperators(dtype)
    if backend in CPU_BACKENDS:
        return torch_backend
    # Not at the top: triton takes a second to import, and a CPU-only machine may lack it.
    from batchmix.models.triton_ops import TritonOperators

    return TritonOperators(config.batch_invariant, config.share_prefix)


def _check_products(
    weights: Weights, config: EngineConfig, rows: int, prefill_tokens: int, prepacked: set[str]
) -> None:
    """Let this machine's matrix library give a row the same bits whatever other rows are in the batch, or report where
    not: a warning, with engine.batch_invariant=true a BatchmixError."""
    layer, tokens = weights.layers[0], rows + prefill_tokens
    products: dict[str, tuple[Weight, int]] = {  # weights, and the most rows they are multiplied with
        "wqkv": (layer.wqkv, tokens), "wo": (layer.wo, tokens), "router": (layer.router, tokens),
        "w13": (layer.w13[0], torch_ops.EXPERT_CHUNK), "w2": (layer.w2[0], torch_ops.EXPERT_CHUNK),
        "lm_head": (weights.lm_head, rows),
    }  # fmt: skip
    dtype = weights.lm_head.dtype  # of experts too, once they are widened
    shapes = {
        name: ((*weight.shape[-2:], torch.float32 if name == "router" else dtype), most)
        for name, (weight, most) in products.items()
    }
    fixed, unsteady = torch_products.hold_bits(shapes, unpacked=shapes.keys() - prepacked)
    if fixed:
        _log.info("this machine's matrix products with %s round a row differently among more rows: they run in calls of"
                  " %d rows, slower and exact", ", ".join(fixed), torch_products.FIXED_ROWS)  # fmt: skip
    if unsteady:
        found = (f"this machine's matrix products with {', '.join(unsteady)} round a row differently among other rows,"
                 f" also in calls of {torch_products.FIXED_ROWS} rows")  # fmt: skip
        remedy = "with model.dtype=float32 or fewer threads (OMP_NUM_THREADS) they may not"
        if config.batch_invariant:
            raise BatchmixError(f"engine.batch_invariant=true: {found}; {remedy}")
        _log.warning("%s: answers may depend on the batch size; %s", found, remedy)


def _measure_memory(
    model: Mixtral, checkpoint: Checkpoint, config: EngineConfig, link: TransferStream | None, plan: Placement | None,
    rows: int, prefill_tokens: int, kv_dtype: torch.dtype,
) -> tuple[int, int]:  # fmt: skip
    """Bytes that the largest step takes, on a GPU measured, on a CPU estimated; KV blocks that fit beside it."""
    block_bytes = KVCache.block_bytes(model.config, BLOCK_SIZE, kv_dtype)
    if link is None:
        workspace = workspace_bytes(model.config, rows, prefill_tokens, checkpoint.quantization is not None)
        processes = model.tp.size * config.data_parallel_size  # which share the memory
        free = int(free_bytes() // processes * config.gpu_memory_utilization) - workspace
    else:
        graphs = config.cuda_graphs and not plan
        workspace = measure_workspace(model, rows, prefill_tokens, graphs, kv_dtype)
        free = gpu_cache_bytes(*link.memory(), workspace, config.gpu_memory_utilization)
        if plan and plan.kv_on_host:  # of which BUFFERS layers are on the device; the scratch block is on the host too
            landings = StagedKVCache.landing_bytes(model.config, kv_dtype, prefill_tokens + rows)
            host = link.host_room - landings - block_bytes
            free = min(free * model.config.num_hidden_layers // BUFFERS, host)
    longest = -(-checkpoint.max_model_len // BLOCK_SIZE)
    return workspace, model.tp.all_reduce_min(kv_blocks(free, block_bytes, longest, rows))


def measure_workspace(model: Mixtral, rows: int, prefill_tokens: int, graphs: bool, kv_dtype: torch.dtype) -> int:
    """Bytes that a GPU's largest step takes, and the memory that CUDA graphs of decode keep. Compiles kernels too."""
    device, total = model.weights.embedding.device, 0
    for tokens in (prefill_tokens, 0) if graphs else (prefill_tokens,):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run_largest_step(model, rows, tokens, kv_dtype)
        torch.cuda.synchronize(device)
        total += torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()  # so that what is free afterwards is what the KV cache may have
    return total


def cache_dtype(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.dtype:
    """In which dtype keys and values are kept, where all else is in `dtype`."""
    return FP8 if checkpoint.kv_cache_dtype is KVCacheDtype.fp8 else dtype


def _stop_table(tokenizer: Tokenizer, vocab_size: int, sampling: SamplingConfig) -> StopTable:
    """A row's stop strings as an automaton over the model's vocabulary, which may be larger or smaller."""
    pieces = vocabulary_bytes(tokenizer, vocab_size, sampling.skip_special_tokens)
    return build_stop_table(sampling.stop or [], pieces, drops_leading_space=tokenizer.drops_leading_space)
