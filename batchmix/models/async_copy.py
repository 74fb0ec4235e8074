"""How host and device reach each other's memory without waiting: copies are queued with the device's work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

CopyEvent = Callable[[], list[np.ndarray]]  # waits for copies on their way to the host, and gives them


def async_copy_to_gpu(data: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made in the order of its work; on the CPU `data` itself. Host memory may change at once."""
    tensor = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    if device.type != "cuda":
        return tensor.to(device)
    # From pinned memory, which torch does not give away before the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)


class AsyncCopy:
    """From a device that is the host itself: copies are there at once."""

    # Whether results are read one step late, once the next one is queued, so that the device always has work. Where the
    # host does the work it would only keep rows that have ended in the batch.
    late = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def to_host(self, tensors: Sequence[Tensor]) -> CopyEvent:
        """The tensors as they are once the device has done what is queued by now."""
        copies = [tensor.clone().numpy() for tensor in tensors]
        return lambda: copies


class GpuAsyncCopy(AsyncCopy):
    """From a GPU: results come back on a stream of their own, into pinned memory."""

    late = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_host(self, tensors: Sequence[Tensor]) -> CopyEvent:
        copies = [tensor.clone() for tensor in tensors]  # what is queued behind may change the tensors meanwhile
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        on_host = [torch.empty(copy.shape, dtype=copy.dtype, pin_memory=True) for copy in copies]
        with torch.cuda.stream(self._stream):
            for target, copy in zip(on_host, copies, strict=True):
                target.copy_(copy, non_blocking=True)
                copy.record_stream(self._stream)
            arrived.record()

        def wait() -> list[np.ndarray]:
            arrived.synchronize()
            return [tensor.numpy() for tensor in on_host]

        return wait


def async_copy_from(device: torch.device) -> AsyncCopy:
    """What suits the device."""
    return GpuAsyncCopy(device) if device.type == "cuda" else AsyncCopy(device)
