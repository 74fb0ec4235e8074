"""Times of single calls, and what the device at hand can reach at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import triton
from triton.testing import do_bench

_COPY_BYTES = 4 << 30  # far beyond any cache
_MATMUL_SIZES = ((8192, 8192, 8192), (16384, 8192, 4096))  # M, N, K; the better one counts
_CPU_SHARE = 1 << 10  # the interpreter is there to try the code path: all of it smaller


@dataclass(frozen=True)
class Ceilings:
    """What this device did when asked for nothing else."""

    copy: float  # bytes a second, read plus written
    matmul: Mapping[str, float]  # operations a second of a dense product, by dtype


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 100) -> float:
    """Median time of one call, in seconds: after a warm-up, with the L2 cache cleared before each call on a GPU.

    `repeats`: milliseconds that a GPU is kept busy, as in triton.testing.do_bench. On a CPU one call after another is timed.
    """
    if device.type == "cpu":
        function()
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    return float(do_bench(function, warmup=25, rep=repeats, return_mode="median")) / 1e3


@dataclass(frozen=True)
class Timing:
    """How long a call took, and how it was made."""

    seconds: float
    how: str  # "captured graph", as the engine runs its kernels; "eager"; "host": the launch alone


def time_call(function: Callable[[], object], device: torch.device) -> Timing:
    """The time of one call in a CUDA graph; eagerly where there is no GPU, or where the call cannot be captured."""
    if device.type == "cuda" and _leaves_the_host_alone(function):
        try:
            return Timing(_captured_seconds(function), "captured graph")
        except RuntimeError:  # `seconds` tells whether it was the capture
            torch.cuda.synchronize()
    return Timing(seconds(function, device), "eager")


def time_launch(function: Callable[[], object], device: torch.device, calls: int = 200) -> Timing:
    """The host's time for one call, median of 5 rounds of calls that wait for nothing. `calls` fit the GPU's queue."""
    if device.type == "cpu":
        return Timing(seconds(function, device), "host")
    function()
    rounds = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        rounds.append((time.perf_counter() - started) / calls)
    torch.cuda.synchronize()
    return Timing(statistics.median(rounds), "host")


def _leaves_the_host_alone(function: Callable[[], object]) -> bool:
    """Whether the call waits for nothing on the device, as in a capture it may not; an error of its own is raised."""
    function()  # compiles, which may wait
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return True


def _captured_seconds(function: Callable[[], object], budget: float = 0.1) -> float:
    """One call in a graph that clears the L2 cache before each call, less what the clearing takes in a graph of its own.

    Gaps between kernels count, as they do in the engine's graphs; the launch of the graph does not.
    """
    cache = triton.runtime.driver.active.get_empty_cache_for_benchmark()
    once = seconds(function, torch.device("cuda"), repeats=10)
    calls = max(3, min(50, int(budget / (once + 1e-4))))  # clearing 256 MB takes about 1e-4 s
    graphs = []
    for work in (lambda: (cache.zero_(), function()), cache.zero_):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        graphs.append(graph)
    both, clearing = (statistics.median(_replay(graph) for _ in range(5)) for graph in graphs)
    return max(both - clearing, 1e-7 * calls) / calls  # a tenth of a microsecond: less than a clock can tell


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def measure_ceilings(device: torch.device, small: int | None = None) -> Ceilings:
    """Copy bandwidth and dense product rates, measured now. `small`: by how much less work than a GPU gets."""
    small = small or (_CPU_SHARE if device.type == "cpu" else 1)
    copy = _copy_rate(device, _COPY_BYTES // small)
    rates = {"bfloat16": _matmul_rate(device, small, torch.mm, torch.bfloat16)}
    if device.type == "cpu":
        rates["float32"] = _matmul_rate(device, small, torch.mm, torch.float32)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        rates["fp8"] = _matmul_rate(device, small, _scaled_mm, torch.float8_e4m3fn)
    return Ceilings(copy, rates)


def _copy_rate(device: torch.device, size: int) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def _matmul_rate(device: torch.device, small: int, product: Callable[..., object], dtype: torch.dtype) -> float:
    best = 0.0
    for m, n, k in _MATMUL_SIZES:
        m, n, k = (max(16, size // small) for size in (m, n, k))
        x, w = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
        best = max(best, 2 * m * n * k / seconds(lambda x=x, w=w: product(x, w.T), device))  # type: ignore[misc]
    return best


def _scaled_mm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    one = torch.ones((), device=x.device)
    return torch._scaled_mm(x, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
