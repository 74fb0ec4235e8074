"""What of a model goes to host memory on this machine, by the memory and the link that are measured now."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial

import torch

from batchmix.checkpoints.checkpoint import Checkpoint
from batchmix.checkpoints.config import OffloadMode
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.memory import HOST_SHARE, free_bytes
from batchmix.models.kv_cache import BLOCK_SIZE
from batchmix.models.tensor_parallel import TensorParallel
from batchmix.offload.staged_cache import StagedKVCache
from batchmix.offload.transfer_stream import CudaTransferStream, TransferStream
from batchmix.planning.cost import footprint
from batchmix.planning.gpus import known_gpu
from batchmix.planning.memory import gpu_cache_bytes, gpu_workspace_bytes
from batchmix.planning.placement import MAX_NUM_SEQS, Machine, Placement, assumed, select_placement
from batchmix.planning.step_cost import EFFICIENCY

_MEASURED_BYTES = 256 << 20  # 5 ms over PCIe 5


def open_transfer_stream(device: torch.device, processes: int, folder: str | None) -> TransferStream | None:
    """None on a CPU, which has all of its memory at hand. The host's memory is shared by `processes`."""
    if device.type == "cpu":
        return None
    return CudaTransferStream(device, int(HOST_SHARE * free_bytes()) // processes, folder)


def plan_offload(
    checkpoint: Checkpoint,
    config: EngineConfig,
    link: TransferStream,
    gpu_name: str,
    prefill_tokens: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    tp: TensorParallel,
) -> Placement | None:
    """What to stream, the same on all ranks; None where all fits the device. BatchmixError where there is no way to run
    the model. `dtypes`: of weights and of cached values."""
    sliced = tp.slice_config(checkpoint.config)
    model = footprint(sliced, dtypes[0].itemsize, checkpoint.quantization, dtypes[1].itemsize)
    device_bytes = tp.all_reduce_min(gpu_cache_bytes(*link.memory(), 0, config.gpu_memory_utilization))
    machine = Machine(device_bytes, 0.0, math.inf, math.inf, math.inf, checkpoint.offload_dir is not None)
    best = partial(
        select_placement,
        model,
        rows=assumed(checkpoint.max_model_len),
        longest=-(-checkpoint.max_model_len // BLOCK_SIZE) * BLOCK_SIZE,
        prefill_tokens=prefill_tokens,
        workspace=lambda rows: gpu_workspace_bytes(sliced, rows, prefill_tokens, dtypes[0].itemsize),
        max_num_seqs=config.max_num_seqs,
    )
    if best(machine=machine, stream=False) is not None:
        return None
    sizes = f"the weights take {model.weight_bytes / 2**30:.1f} GiB, of the GPU {device_bytes / 2**30:.1f} GiB are free"
    if checkpoint.offload is OffloadMode.never:
        if model.weight_bytes < device_bytes:  # the estimate of the workspace may be too large
            return None
        raise BatchmixError(
            f"model.offload=never: {sizes}; use model.quantization, model.tensor_parallel_size or model.offload=auto"
        )
    gpu = known_gpu(gpu_name)
    if gpu is not None:
        machine = replace(machine, hbm=gpu.bandwidth_gbs * 1e9 * EFFICIENCY, flops=gpu.tflops * 1e12 * EFFICIENCY)
    bandwidth = tp.all_reduce_min(int(measure_link(link)))
    most = prefill_tokens + (config.max_num_seqs or MAX_NUM_SEQS)  # tokens of a step
    host_bytes = tp.all_reduce_min(link.host_room) - StagedKVCache.landing_bytes(sliced, dtypes[1], most)
    host_bytes -= BLOCK_SIZE * model.kv_bytes  # the scratch block
    placement = best(machine=replace(machine, host_bytes=host_bytes, link=bandwidth))
    if placement is None:
        raise BatchmixError(
            f"model.offload=auto: {sizes} and of the host {host_bytes / 2**30:.1f} GiB; use model.quantization,"
            " model.offload_dir or a smaller model.max_model_len"
        )
    return placement


def measure_link(link: TransferStream) -> float:
    """Bytes a second of a copy to the device."""
    source = link.host((_MEASURED_BYTES,), torch.uint8)
    target = link.empty((_MEASURED_BYTES,), torch.uint8)
    link.finish(link.copy([(target, source)]))
    started = time.perf_counter()
    link.finish(link.copy([(target, source)]))
    return _MEASURED_BYTES / (time.perf_counter() - started)
