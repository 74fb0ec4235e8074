"""How much memory this machine has, and how this process keeps it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil

_CGROUPS = (  # limit, use: of control groups version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT_BYTES = 1 << 30
HOST_SHARE = 0.9  # of host memory, for weights and KV cache; the rest is for rows on their way and the page cache


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
