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
    """From a device to the host: a GPU's results come on a stream of their own, into pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Whether results are read one step late, once the next one is queued, so that the device always has work. Where
        # the host does the work it would only keep rows that have ended in the batch.
        self.late = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.late else None  # type: ignore[no-untyped-call]

    def to_host(self, tensors: Sequence[Tensor]) -> CopyEvent:
        """The tensors as they are once the device has done what is queued by now."""
        copies = [tensor.clone() for tensor in tensors]  # what is queued behind may change the tensors meanwhile
        if self._stream is None:
            return lambda: [copy.numpy() for copy in copies]
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
