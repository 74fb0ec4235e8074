"""Every kernel compiles for GPUs that are not there, fits into them, and uses what it was written for."""

from __future__ import annotations

from collections.abc import Iterator

import launches
import pytest
from ahead_of_time import Compiled, Compiler, find_cuobjdump

from batchmix.kernels.gpu import A100, B200, H100, MI300X, RTX4090, Gpu

GPUS = {gpu.arch: gpu for gpu in (A100, RTX4090, H100, B200, MI300X)}
TENSOR_MEMORY_COLUMNS = 512  # of an SM of Blackwell
ONE_ADDRESS = 8  # bytes that ptxas may park outside the loops; it does so once, in decode of a single head
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, technical specifications

needs_cuobjdump = pytest.mark.skipif(find_cuobjdump() is None, reason="neither triton nor the PATH has cuobjdump")


def cases() -> Iterator[object]:
    for name, call in launches.CALLS.items():
        for arch in call.arches:
            if not name.startswith("toy"):
                slow = () if call.quick and arch == "sm_90" else (pytest.mark.slow,)  # 1 to 60 s each
                yield pytest.param(name, arch, id=f"{name}-{arch}", marks=slow)


def complaints(kernels: list[Compiled], gpu: Gpu, wgmma: tuple[str, ...]) -> list[str]:
    """What keeps the kernels from running well on the GPU, or at all."""
    found = []
    for item in kernels:
        what = f"{item.kernel} [{item.meta}]"
        if item.shared > gpu.shared_memory:
            found.append(f"{what}: {item.shared} bytes of shared memory, {gpu.arch} has {gpu.shared_memory}")
        if item.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"{what}: {item.tensor_memory} columns of tensor memory")
        if any(not 1 <= size <= limit for size, limit in zip(item.grid, GRID_LIMITS, strict=False)):
            found.append(f"{what}: a grid of {item.grid}")
        if gpu.arch == "sm_90" and ((item.stack or 0) > ONE_ADDRESS or item.local):
            found.append(
                f"{what}: spills, {item.stack} bytes of stack and {item.local} local at {item.registers} registers"
            )
        if gpu.arch == "sm_90" and item.kernel in wgmma and not item.wgmma:
            found.append(f"{what}: no wgmma, {item.mma} mma.sync")
    return found + [f"{name} was not launched" for name in wgmma if all(item.kernel != name for item in kernels)]


@pytest.mark.parametrize(("name", "arch"), list(cases()))
def test_kernels_fit(compiler: Compiler, name: str, arch: str) -> None:
    kernels = compiler(name, arch)
    assert kernels, "nothing was launched"
    assert not complaints(kernels, GPUS[arch], launches.CALLS[name].wgmma)


def test_the_launch_is_the_real_one(compiler: Compiler) -> None:
    [kernel] = compiler("toy-small", "sm_90")
    assert kernel.grid == (8,)
    assert kernel.wgmma > 0
    assert "BM=64 BN=128 BK=64 warps=4" in kernel.meta
    assert not complaints([kernel], H100, ("matmul_kernel",))


@needs_cuobjdump
def test_spills_are_seen(compiler: Compiler) -> None:
    shared_memory, spills = complaints(compiler("toy-spills", "sm_90"), H100, ())
    assert "bytes of shared memory, sm_90 has 232448" in shared_memory
    assert "spills" in spills


def test_a_kernel_that_does_not_compile_is_an_error_and_the_next_one_compiles(compiler: Compiler) -> None:
    with pytest.raises(RuntimeError, match="no-such-call"):
        compiler("no-such-call", "sm_90")
    assert compiler("toy-small", "sm_90")


def test_limits_are_checked() -> None:
    kernel = Compiled(
        "k",
        "",
        200_000,
        0,
        64,
        0,
        0,
        wgmma=0,
        mma=4,
        fp_fusion=True,
        floats={},
        loops=[],
        grid=(1, 70_000),
        seconds=0.0,
    )
    assert len(complaints([kernel], A100, ())) == 2
    assert complaints([kernel], H100, ("k",))[1:] == ["k []: no wgmma, 4 mma.sync"]
    assert complaints([kernel], H100, ("other",))[-1] == "other was not launched"
