"""A tensor that lives on the device and in host memory."""

from __future__ import annotations

import numpy as np
import torch


class Mirror:
    """`array` on the host, `tensor` on the device. On the CPU the two are one memory and nothing is ever copied."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, fill: int = 0) -> None:
        # Pinned memory is what a GPU copies from and to while the host goes on.
        self._host = torch.full(shape, fill, dtype=dtype, pin_memory=device.type != "cpu")
        self.array: np.ndarray = self._host.numpy()
        self.tensor = self._host if device.type == "cpu" else self._host.to(device)

    def upload(self) -> None:
        """Host to device, in the order of the device's work; leave `array` alone until a `fetch`."""
        if self.tensor is not self._host:
            self.tensor.copy_(self._host, non_blocking=True)

    def fetch(self) -> None:
        """Device to host; waits for the device."""
        if self.tensor is not self._host:
            self._host.copy_(self.tensor)

    def widened(self, width: int, fill: int) -> Mirror:
        """A [rows, width] mirror of this [rows, fewer] one, the new columns filled; not uploaded yet."""
        wider = Mirror((len(self.array), width), self._host.dtype, self.tensor.device, fill)
        wider.array[:, : self.array.shape[1]] = self.array
        return wider
