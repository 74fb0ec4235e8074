"""The keys of `engine`: how the work is laid out on the device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from batchmix.config_key import key


class Backend(Enum):
    auto = "auto"
    triton = "triton"
    numba = "numba"
    torch = "torch"


CPU_BACKENDS = (Backend.numba, Backend.torch)


@dataclass
class EngineConfig:
    """How the work is laid out on the device.

    `batch_invariant`: on the triton backend, the same tiles for any number of rows. On a CPU products give a row the same
    bits whatever other rows are in the batch as it is; with true, a machine whose matrix library cannot is refused where it
    is warned of otherwise.
    """

    device: str = key(
        "auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...; with several processes, the device of the first"
    )
    data_parallel_size: int = key(1, "models that run side by side on this machine, each with a share of the rows")
    backend: Backend = key(Backend.auto, "auto: triton on a GPU; on the CPU numba where it is installed, else torch")
    gpu_memory_utilization: float = key(
        0.9, "share of the device's memory to use; on a CPU, of the memory that is free at the start"
    )
    max_num_seqs: int | None = key(
        None, "most rows that decode at once; null: what the KV cache holds, up to 1,024 (256 on a CPU)"
    )
    max_num_batched_tokens: int = key(
        8192, "most tokens of a step: one for each decoding row, and prompt chunks of up to 2,048 tokens"
    )
    sort_window: int = key(16384, "rows that are held and sorted by length at once")
    share_prefix: bool = key(True, "triton backend: compute once what prompts begin with in common")
    cuda_graphs: bool = key(True, "triton backend: run a step that only decodes as one CUDA graph")
    batch_invariant: bool = key(False, "GPU: a row has the same bits whatever other rows are in its batch; slower")
    trace: bool = key(
        False, "write trace.json, a Chrome trace of all threads and the device, into output.dir/.batchmix"
    )
