"""The way between host memory and a device: room at both ends, and copies that run beside the computation."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from batchmix.errors import BatchmixError

Pairs = Sequence[tuple[Tensor, Tensor]]  # target, source


class TransferStream(Protocol):
    """What streaming needs of a device. `CudaTransferStream` is one; tests have another, whose copies come as late as they may."""

    host_room: int  # bytes of the host that copies run from at full speed

    def memory(self) -> tuple[int, int]:
        """Bytes of the device: free, and in all."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the device, not initialised; torch.OutOfMemoryError where it has no more."""

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros in memory of the host that the device copies from and to."""

    def copy(self, pairs: Pairs) -> Any:
        """Begin to copy to or from the device, behind all work that it has been given so far. Returns a handle."""

    def wait(self, handle: Any) -> None:
        """Let the device's work from here on begin when the copy is done; the host goes on. May be called again."""

    def finish(self, handle: Any) -> None:
        """Let the host wait for the copy."""


class CudaTransferStream:
    """A GPU, with a stream for copies to it and one for copies from it.

    The first `pinned_bytes` of host memory are page-locked, the rest is a file in `folder`, mapped. A copy from a mapped
    file waits for the disk and for the driver's staging buffers, so a thread does it.
    """

    def __init__(self, device: torch.device, pinned_bytes: int, folder: str | None = None) -> None:
        self.host_room = pinned_bytes
        self._device, self._folder = device, folder
        self._to, self._from = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, "offload")

    def memory(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self._device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        tensor.record_stream(self._to)  # once freed, not given to others before the copies are through
        return tensor

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size > self.host_room:
            return mapped(shape, dtype, self._folder)
        self.host_room -= size
        return torch.frombuffer(_Locked(size), dtype=dtype).view(tuple(shape))

    def copy(self, pairs: Pairs) -> Any:
        given = torch.cuda.current_stream(self._device).record_event()
        if all(source.is_cuda or source.is_pinned() for _, source in pairs):
            return self._copy(pairs, given)
        return self._thread.submit(self._copy, pairs, given)

    def _copy(self, pairs: Pairs, given: torch.cuda.Event) -> torch.cuda.Event:
        stream = self._from if pairs and pairs[0][1].is_cuda else self._to
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            stream.wait_event(given)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            done: torch.cuda.Event = stream.record_event()
            return done

    def wait(self, handle: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(_event(handle))

    def finish(self, handle: Any) -> None:
        _event(handle).synchronize()


def _event(handle: torch.cuda.Event | Future[torch.cuda.Event]) -> torch.cuda.Event:
    return handle.result() if isinstance(handle, Future) else handle


class _Locked(mmap.mmap):
    """Page-locked memory of exactly its size.

    torch's pin_memory rounds up to a power of two, and would take 128 GiB for Mixtral-8x7B's 84. Pages are locked where
    they lie: on a machine of several sockets, run under `numactl` with the GPU's node.
    """

    address = 0  # 0: not locked

    def __new__(cls, size: int) -> _Locked:
        memory = super().__new__(cls, -1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # of Linux, where the kernel has them: 512 times fewer pages to lock
            memory.madvise(mmap.MADV_HUGEPAGE)
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        failed = int(_cudart().cudaHostRegister(address, len(memory), 0))
        if failed:
            raise BatchmixError(
                f"model.offload: {len(memory) / 2**30:.2f} GiB of host memory cannot be page-locked (CUDA error {failed});"
                " free some memory, or use model.quantization"
            )
        memory.address = address
        return memory

    def __del__(self) -> None:
        if self.address:
            torch.cuda.synchronize()  # copies that still run
            _cudart().cudaHostUnregister(self.address)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def mapped(shape: Sequence[int], dtype: torch.dtype, folder: str | None) -> Tensor:
    """A tensor in a file of `folder` that has no name, and so is gone with the process however that ends.

    BatchmixError where there is no folder, or no room in it.
    """
    size = math.prod(shape) * dtype.itemsize
    if folder is None:
        raise BatchmixError(
            f"model.offload: host memory is short of {size / 2**30:.2f} GiB for weights; name a folder on a fast disk in"
            " model.offload_dir, or use model.quantization"
        )
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here and not as a signal later
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(tuple(shape))
    except OSError as error:
        raise BatchmixError(
            f"model.offload_dir={folder}: {size / 2**30:.2f} GiB cannot be written ({error.strerror})"
        ) from None
