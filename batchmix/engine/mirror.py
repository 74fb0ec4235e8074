"""A table of the host's with a copy on the device."""

from __future__ import annotations

import numpy as np
import torch

from batchmix.engine.async_copy import async_copy_to_gpu


class CpuGpuBuffer:
    """`array` on the host, `tensor` on the device, which sees changes once they are uploaded. InputBatch are along `axis`."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, fill: int = 0, axis: int = 0
    ) -> None:
        host = torch.full(shape, fill, dtype=dtype)
        self.array: np.ndarray = host.numpy()
        self.tensor = host.to(device, copy=True)
        self._axis = axis

    def upload(self, slots: np.ndarray) -> None:
        """Copy these slots, int64 [N], to the device."""
        device = self.tensor.device
        self.tensor.index_copy_(
            self._axis, async_copy_to_gpu(slots, device), async_copy_to_gpu(self.array.take(slots, self._axis), device)
        )

    def move(self, targets: np.ndarray, sources: np.ndarray) -> None:
        """On the device, let slots `targets` be as slots `sources` are, int64 [N] each, all at the same time."""
        device = self.tensor.device
        moved = self.tensor.index_select(self._axis, async_copy_to_gpu(sources, device))
        self.tensor.index_copy_(self._axis, async_copy_to_gpu(targets, device), moved)

    def widened(self, width: int, fill: int) -> CpuGpuBuffer:
        """A [rows, width] mirror of this [rows, fewer] one, the new columns filled."""
        wider = CpuGpuBuffer((len(self.array), width), self.tensor.dtype, self.tensor.device, fill)
        wider.array[:, : self.array.shape[1]] = self.array
        wider.upload(np.arange(len(self.array)))
        return wider
