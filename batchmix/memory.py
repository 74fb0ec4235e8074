"""How much memory there is, and how much of it the KV cache takes."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil

from batchmix.errors import BatchmixError
from batchmix.model.config import MixtralConfig

_CGROUPS = (  # limit, use: of control groups version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT_BYTES = 1 << 30
HOST_SHARE = 0.9  # of host memory, for weights and KV cache; the rest is for rows on their way and the page cache
LOGITS_COPIES = 4  # float32 copies of a step's logits that sampling works on
WIDENED_COPIES = 2  # float32 copies of one expert that is widened to run
PREFILL_COPIES = 8  # activations of a step, in units of tokens x hidden size x 4 bytes, beside the expert rows


def free_bytes() -> int:
    """Memory that this process may still take: what the machine has available, or its control group leaves."""
    free = int(psutil.virtual_memory().available)
    for limit, used in _CGROUPS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or its limit is "max"
            continue
    return free


def host_bytes() -> float:
    """Memory that weights and KV cache may take of a machine like this one."""
    return HOST_SHARE * int(psutil.virtual_memory().total)


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def workspace_bytes(config: MixtralConfig, max_num_seqs: int, max_num_batched_tokens: int, quantized: bool) -> int:
    """An estimate of what the largest step takes beside weights and KV cache, on a CPU: a token for each row, and chunks."""
    tokens = max_num_seqs + max_num_batched_tokens
    activations = tokens * 4 * config.hidden_size * PREFILL_COPIES
    experts = tokens * config.num_experts_per_tok * 4 * (3 * config.intermediate_size + config.hidden_size)
    if quantized:
        experts += 3 * config.hidden_size * config.intermediate_size * 4 * WIDENED_COPIES
    return activations + experts + max_num_seqs * config.vocab_size * 4 * LOGITS_COPIES


def gpu_workspace_bytes(config: MixtralConfig, max_num_seqs: int, max_num_batched_tokens: int, itemsize: int) -> int:
    """As `workspace_bytes`, of the Triton backend, before the weights are there to measure it with.

    Of a layer: 8 activations of hidden size, and the experts' inputs, hidden values and outputs.
    """
    hidden = config.hidden_size
    experts = config.num_experts_per_tok * (2 * hidden + config.intermediate_size)
    logits = max_num_seqs * config.vocab_size * 4 * LOGITS_COPIES
    return (max_num_seqs + max_num_batched_tokens) * itemsize * (8 * hidden + experts) + logits


def gpu_cache_bytes(free: int, total: int, workspace: int, utilization: float) -> int:
    """What the KV cache may take of a GPU's `free` bytes: the share 1 - utilization of all its memory stays untouched."""
    return int(free - workspace - (1 - utilization) * total)


def kv_blocks(free: int, block_bytes: int, blocks_per_row: int, max_num_seqs: int) -> int:
    """Blocks for the KV cache: as many as `free` bytes hold, at most what max_num_seqs rows of full length use.

    BatchmixError where not even one row of full length fits.
    """
    affordable = free // block_bytes
    if affordable < blocks_per_row:
        needed, there = blocks_per_row * block_bytes / 2**30, max(0, free) / 2**30
        raise BatchmixError(
            f"the KV cache of one row needs {needed:.2f} GiB and {there:.2f} GiB are left;"
            " lower model.max_model_len, engine.max_num_seqs or engine.max_num_batched_tokens"
        )
    return int(min(affordable, blocks_per_row * max_num_seqs))


def keep_freed_memory() -> None:
    """Let glibc's allocator keep the memory of freed tensors for the next ones instead of giving it back to the kernel.

    A step's activations are tens of MB; returned and taken again they cost a page fault for every 4 KiB, 20 % of the
    time of a small model on a CPU. Does nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
