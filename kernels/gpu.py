"""What a launcher may know of the GPU it launches on: the only place where kernels ask torch about devices."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Gpu:
    """The properties that tiles and grids are chosen by."""

    name: str
    arch: str  # "sm_90", "gfx942"; "cpu" under Triton's interpreter
    num_sms: int  # streaming multiprocessors, or AMD's compute units
    shared_memory: int  # bytes that one block can have

    @property
    def has_tensor_memory_accelerator(self) -> bool:
        """Hopper and data-centre Blackwell: descriptors, and tensor cores that read operands from shared memory.

        Consumer Blackwell (sm_120) has the first without the second, so its tiles are Ampere's and Ada's.
        """
        return self.arch in ("sm_90", "sm_100", "sm_103")


# NVIDIA: SMs of the boards, and "maximum shared memory per thread block" of the CUDA C++ Programming Guide's table of
# compute capabilities (163 KB for 8.0, 99 KB for 8.6, 8.9 and 12.0, 227 KB for 9.0 and 10.0). AMD: CDNA 3 white paper (304 CUs, 64 KB LDS).
A100 = Gpu("NVIDIA A100-SXM4-80GB", "sm_80", 108, 163 * 1024)
RTX4090 = Gpu("NVIDIA GeForce RTX 4090", "sm_89", 128, 99 * 1024)
H100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90", 132, 227 * 1024)
H200 = Gpu("NVIDIA H200", "sm_90", 132, 227 * 1024)
B200 = Gpu("NVIDIA B200", "sm_100", 148, 227 * 1024)
MI300X = Gpu("AMD Instinct MI300X", "gfx942", 304, 64 * 1024)
INTERPRETER = Gpu("Triton interpreter", "cpu", 4, 227 * 1024)  # 4: programs of a persistent kernel get several tiles

_assumed: ContextVar[Gpu | None] = ContextVar("assumed_gpu", default=None)


def current_gpu(device: torch.device) -> Gpu:
    """The GPU behind `device`. RuntimeError for a CPU device without Triton's interpreter."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    if device.type != "cuda":
        raise RuntimeError(
            f"Triton kernels need tensors on a GPU, these are on {device}. "
            "To try them on the CPU, slowly, set TRITON_INTERPRET=1 before the first import of triton."
        )
    return _of_index(torch.cuda.current_device() if device.index is None else device.index)


@contextmanager
def assume_gpu(gpu: Gpu) -> Iterator[None]:
    """Inside, `current_gpu` answers `gpu`: compiling for a GPU that is not there."""
    token = _assumed.set(gpu)
    try:
        yield
    finally:
        _assumed.reset(token)


@functools.cache
def _of_index(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]  # "gfx942:sramecc+:xnack-"
        shared_memory = properties.shared_memory_per_block
    else:
        arch = f"sm_{properties.major}{properties.minor}"
        shared_memory = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(properties.name, arch, properties.multi_processor_count, shared_memory)
