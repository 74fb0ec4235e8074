"""`batchmix benchmark kernels`: ceilings first, then every kernel against them and against its peers."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton

from batchmix.errors import BatchmixError
from batchmix.kernels.gpu import current_gpu
from batchmix.measure.attention import decode_case, prefill_case
from batchmix.measure.case import SHAPES, Case, Run
from batchmix.measure.config import BenchmarkConfig
from batchmix.measure.moe import FORMATS, moe_cases
from batchmix.measure.rest import elementwise_cases, launch_cases, linear_case, sampling_case
from batchmix.measure.result import save_result
from batchmix.measure.timing import Ceilings, Timing, measure_ceilings, time_call, time_launch

TOKENS = [1, 16, 64, 256, 1024, 4096, 16384, 65536]
_TINY_TOKENS = [1, 40]
_HEADER = ("kernel", "work", "dtype", "ms", "TFLOP/s", "GB/s", "% of ceiling", "error", "peers")


def benchmark_kernels(config: BenchmarkConfig) -> Path:
    """Measure, print a line for each case as it is known, and write it all to a JSON file, whose path is given back."""
    if config.shape not in SHAPES:
        raise BatchmixError(f"benchmark.shape={config.shape}: the shapes are {', '.join(SHAPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise BatchmixError(
            "benchmark kernels: there is no GPU; to try the code path on the CPU, TRITON_INTERPRET=1 batchmix "
            "benchmark kernels benchmark.shape=tiny"
        )
    gpu = current_gpu(device)
    ceilings = measure_ceilings(device)
    rates = ", ".join(f"{name} product {rate / 1e12:,.1f} TFLOP/s" for name, rate in ceilings.matmul.items())
    print(f"{gpu.name}: copy {ceilings.copy / 1e9:,.0f} GB/s (read plus written), {rates}")
    print(" | ".join(_HEADER), flush=True)
    found = []
    for case in _cases(config, device):
        found.append(_measure(case, ceilings, device))
        print(_line(found[-1]), flush=True)
    result = {
        "gpu": gpu.name,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "ceilings": asdict(ceilings),
        "shape": config.shape,
        "cases": found,
    }
    path = save_result(config.dir, gpu.name, "kernels", result)
    wrong = [case for case in found if not case["right"]]
    if wrong:
        raise BatchmixError(f"{len(wrong)} of {len(found)} cases are not within tolerance of their oracle (see {path})")
    return path


def _cases(config: BenchmarkConfig, device: torch.device) -> Iterator[Case]:
    shape, tiny = SHAPES[config.shape], config.shape == "tiny"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = config.tokens or (_TINY_TOKENS if tiny else TOKENS)
    decode = [(3, 300, 0), (4, 400, 256)] if tiny else [(256, 1024, 0), (32, 16384, 0), (256, 1152, 1024)]
    groups: dict[str, Callable[[], Iterator[Case]]] = {
        "moe": lambda: moe_cases(shape, config.formats or _formats(device), tokens, device),
        "prefill": lambda: (prefill_case(shape, n, device, dtype) for n in ([100] if tiny else [1024, 8192, 32768])),
        "decode": lambda: (decode_case(shape, *work, device, dtype) for work in decode),
        "linear": lambda: (linear_case(shape, n, device, dtype) for n in tokens),
        "elementwise": lambda: chain.from_iterable(
            elementwise_cases(shape, n, device, dtype) for n in ([40] if tiny else [256, 8192])
        ),
        "launch": lambda: launch_cases(shape, device, dtype),
        "sampling": lambda: iter([sampling_case(shape, 4 if tiny else 512, device)]),
    }
    wanted = config.only or list(groups)
    for name in wanted:
        if name not in groups:
            raise BatchmixError(f"benchmark.only has {name!r}; the groups are {', '.join(groups)}")
    for name in wanted:
        yield from groups[name]()


def _formats(device: torch.device) -> list[str]:
    """The weight formats that this device runs."""
    fp8 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)
    return [form for form in FORMATS if form != "float32" and (fp8 or not form.startswith("fp8"))]


def _measure(case: Case, ceilings: Ceilings, device: torch.device) -> dict[str, Any]:
    error = case.check()
    timing = _time(case, case.run, device)
    took = timing.seconds
    flops, moved = case.flops / took, case.bytes / took
    ceiling = ceilings.matmul.get(case.rate)
    shares = {"memory": moved / ceilings.copy, "compute": flops / ceiling if ceiling else 0.0}
    bound = max(shares, key=lambda name: shares[name])
    return {
        "kernel": case.kernel,
        "work": case.work,
        "dtype": case.dtype,
        "seconds": took,
        "timed": timing.how,
        "flops_per_second": flops,
        "bytes_per_second": moved,
        "bound": bound,
        "share_of_ceiling": shares[bound],
        "error": error,
        "tolerance": case.tolerance,
        "right": error <= case.tolerance,
        "peers": {name: _time_peer(case, run, took, device) for name, run in case.peers.items()},
    }


def _time(case: Case, run: Run, device: torch.device) -> Timing:
    return time_launch(run, device) if case.of_host else time_call(run, device)


def _time_peer(case: Case, run: Run, ours: float, device: torch.device) -> dict[str, Any]:
    """A peer's time and how many times ours it is; or why it does not run here."""
    try:
        theirs = _time(case, run, device)
    except (RuntimeError, NotImplementedError, ImportError, ValueError) as error:
        return {"error": str(error).strip().partition("\n")[0]}
    return {"seconds": theirs.seconds, "timed": theirs.how, "ratio": theirs.seconds / ours}


def _line(found: dict[str, Any]) -> str:
    peers = ", ".join(
        f"{name} {peer['ratio']:.2f} x{_aside(peer, found)}"
        if "ratio" in peer
        else f"{name} does not run ({peer['error'][:60]})"
        for name, peer in found["peers"].items()
    )
    share = f"{found['share_of_ceiling']:.0%} of {found['bound']}"
    if found["timed"] == "eager":
        share += ", eager"
    if found["timed"] == "host":
        share = f"{found['seconds'] * 1e6:.0f} us of the host"
    wrong = "" if found["right"] else " WRONG"
    return (
        f"{found['kernel']} | {found['work']} | {found['dtype']} | {found['seconds'] * 1e3:.3f}"
        f" | {found['flops_per_second'] / 1e12:.1f} | {found['bytes_per_second'] / 1e9:,.0f} | {share}"
        f" | {found['error']:.1e}{wrong} | {peers}"
    )


def _aside(peer: dict[str, Any], ours: dict[str, Any]) -> str:
    """How a peer was timed, where that is not how our kernel was."""
    return "" if peer["timed"] == ours["timed"] else f" ({peer['timed']})"
