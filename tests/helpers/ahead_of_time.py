"""Compile what launchers would launch for GPUs that are not there, and tell what the compiled kernels need.

A launcher runs as it is, on CPU tensors whose memory is never touched. Triton gets a driver that names another GPU, and
JITFunction.run stops before the launch; so arguments, their specialisation (divisible by 16, equal to 1, tensor
descriptors), constexprs, warps and stages are the real ones, through triton's own code. It takes a process without
TRITON_INTERPRET, which is read where a kernel is decorated: `Compiler` starts one and asks it over pipes. By hand:

    python tests/helpers/ahead_of_time.py sm_90              # every call in launches.py, as a table
    python tests/helpers/ahead_of_time.py sm_90 quantize     # those whose name contains "quantize"
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
ARCHES = ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"]


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would be launched."""

    kernel: str
    meta: str  # the constexprs that are tiles and switches, warps and stages
    shared: int  # bytes of shared memory a block
    tensor_memory: int  # columns of Blackwell's tensor memory
    registers: int | None  # a thread; None where there is no cuobjdump, or on AMD
    stack: int | None  # bytes a thread; spilled registers live there
    local: int | None
    wgmma: int  # instructions in the PTX
    mma: int  # mma.sync in the PTX
    fp_fusion: bool  # whether the compiler may fuse a product and a sum
    floats: dict[str, int]  # floating-point instructions in the PTX, products of matrices among them
    loops: list[dict[str, int]]  # the same of each innermost loop that multiplies matrices, in order
    grid: tuple[int, ...]
    seconds: float


class Compiler:
    """A process that compiles; it is started again should LLVM take it down."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, call: str, arch: str) -> list[Compiled]:
        """Every distinct kernel that the call launches on `arch`. RuntimeError with the traceback if one fails."""
        if self._process is None or self._process.poll() is not None:
            environment = {**os.environ, "TRITON_INTERPRET": "0"}
            command = [sys.executable, __file__, "--serve"]
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([call, arch]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the compiler ended with status {self._process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return [Compiled(**{**item, "grid": tuple(item["grid"])}) for item in answer]

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()  # closes its input, at which it ends


def find_cuobjdump() -> str | None:
    """NVIDIA's cuobjdump: triton's own, or one on the PATH."""
    import triton

    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and so on of the one kernel in a cubin."""
    tool = find_cuobjdump()
    if tool is None:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown.stdout)}


_PRODUCT = re.compile(r"(?:mma\.sync|wgmma\.mma_async\.sync)\.[\w.:]+")
_FLOAT = re.compile(r"\s(?:fma|mul|add|sub|neg|max|min|ex2|lg2|div|rcp|sqrt|rsqrt)\.[\w.]*f(?:16|16x2|32|64)\b")


def _count_floats(ptx: list[str]) -> dict[str, int]:
    """How often each floating-point instruction stands in the lines."""
    found = [match[0].strip() for line in ptx for match in [_PRODUCT.search(line) or _FLOAT.search(line)] if match]
    return dict(sorted(Counter(found).items()))


def _count_loops(ptx: list[str]) -> list[dict[str, int]]:
    """Instructions of each loop that holds no other loop and multiplies matrices."""
    labels = {line.split(":")[0]: number for number, line in enumerate(ptx) if line.startswith("$L")}
    spans = []
    for number, line in enumerate(ptx):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        if jump and labels[jump[1]] < number:
            spans.append((labels[jump[1]], number))
    innermost = [
        (low, high)
        for low, high in spans
        if not any((low, high) != other and low <= other[0] and other[1] <= high for other in spans)
    ]
    counts = [_count_floats(ptx[low:high]) for low, high in sorted(innermost)]
    return [count for count in counts if any("mma" in name for name in count)]


class _Driver:
    """As much of triton's driver as compiling asks for; launches do nothing."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 1 << 30},
        load_binary=lambda *_: (1, 1, 0, 0, 1024),  # module, function, registers, spills, most threads
    )

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        cuda = arch.startswith("sm_")
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32) if cuda else GPUTarget("hip", arch, 64)
        self.index = ARCHES.index(arch)  # JITFunction keeps one cache of compiled kernels a device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *_: None


def _compile(call: Callable[[], None], arch: str) -> list[Compiled]:
    """Run `call` on every GPU of `arch`; what it launched, each once. Only in a process without TRITON_INTERPRET."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from batchmix.kernels.gpu import A100, B200, H100, H200, MI300X, RTX4090, assume_gpu
    from batchmix.kernels.launch import Kernel

    gpus = [
        gpu for gpu in (A100, RTX4090, H100, H200, B200, MI300X) if gpu.arch == arch
    ]  # each may have tables of its own
    compiled: dict[int, Compiled] = {}
    run, getitem = JITFunction.run, Kernel.__getitem__

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in compiled:
            named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
            compiled[id(kernel)] = _describe(self, kernel, named, grid, time.perf_counter() - start)
        return kernel

    driver.set_active(_Driver(arch))  # type: ignore[arg-type]
    JITFunction.run, Kernel.__getitem__ = record, lambda self, grid: self.jit[grid]
    try:
        for gpu in gpus:
            with assume_gpu(gpu):
                call()
    finally:
        JITFunction.run, Kernel.__getitem__ = run, getitem
    return list(compiled.values())


def _describe(function: Any, kernel: Any, named: dict[str, Any], grid: Any, seconds: float) -> Compiled:
    usage = _resource_usage(kernel.asm["cubin"]) if "cubin" in kernel.asm else {}
    ptx = kernel.asm.get("ptx", "")
    constexprs = {p.name: named.get(p.name, p.default) for p in function.params if p.is_constexpr}
    meta = {**constexprs, "warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages}
    return Compiled(
        kernel=function.__name__,
        meta=" ".join(f"{name}={value}" for name, value in meta.items()),
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        registers=usage.get("REG"),
        stack=usage.get("STACK"),
        local=usage.get("LOCAL"),
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        fp_fusion=kernel.metadata.enable_fp_fusion,
        floats=_count_floats(ptx.splitlines()),
        loops=_count_loops(ptx.splitlines()),
        grid=tuple(grid(named) if callable(grid) else grid),
        seconds=round(seconds, 2),
    )


def _serve(answers: Any) -> None:
    import launches

    for line in sys.stdin:
        name, arch = json.loads(line)
        try:
            answer: Any = [asdict(item) for item in _compile(launches.CALLS[name].run, arch)]
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


def _show(arch: str, part: str) -> None:
    import launches

    for name, call in launches.CALLS.items():
        if part in name and arch in call.arches:
            print(name)
            for item in _compile(call.run, arch):
                print(f"  {item.kernel} {item.meta}\n    grid {item.grid}, {item.registers} registers, stack {item.stack},"
                      f" shared {item.shared}, wgmma {item.wgmma}, mma {item.mma}, {item.seconds} s")  # fmt: skip


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    os.environ["TRITON_INTERPRET"] = "0"
    if sys.argv[1:] == ["--serve"]:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what compilers print goes to stderr, the answers alone to stdout
        _serve(answers)
    else:
        _show(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
