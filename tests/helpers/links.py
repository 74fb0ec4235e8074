"""A device that is host memory with a limit, and whose copies come as late as they may."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from batchmix.offload.transfer_stream import Pairs, mapped


class FakeLink:
    """See `TransferStream`. Memory is poisoned (NaN) from its allocation, and from the begin of a copy into it until its wait.

    So a missing wait, and a copy that begins before its target was used for the last time, both change results; so does a
    source that changes before the wait, of which something comes that was never in it.
    """

    def __init__(self, capacity: int = 1 << 40, folder: Path | None = None, host_room: int = 1 << 40) -> None:
        self.capacity, self.host_room = capacity, host_room
        self.folder = folder  # of files for what host_room is too small for
        self.used = self.peak = self.host_bytes = self.copied = 0

    def memory(self) -> tuple[int, int]:
        return self.capacity - self.used, self.capacity

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype)
        if self.used + tensor.nbytes > self.capacity:
            raise torch.OutOfMemoryError(f"{self.used} bytes in use, {tensor.nbytes} wanted of {self.capacity}")
        self.used += tensor.nbytes
        self.peak = max(self.peak, self.used)
        weakref.finalize(tensor, self._free, tensor.nbytes)
        poison(tensor)
        return tensor

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.zeros(tuple(shape), dtype=dtype)
        if tensor.nbytes > self.host_room:
            tensor = mapped(shape, dtype, None if self.folder is None else str(self.folder))
        else:
            self.host_room -= tensor.nbytes
        self.host_bytes += tensor.nbytes
        return tensor

    def copy(self, pairs: Pairs) -> list[tuple[Tensor, Tensor, Tensor]]:
        for target, source in pairs:
            poison(target)
            self.copied += source.nbytes
        return [(target, source, source.clone()) for target, source in pairs]

    def wait(self, handle: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        for target, source, before in handle:
            target.copy_(before)
            if not torch.equal(_bytes(source), _bytes(before)):
                _bytes(target).fill_(0x3B)
        handle.clear()

    finish = wait

    def _free(self, size: int) -> None:
        self.used -= size


def poison(tensor: Tensor) -> None:
    _bytes(tensor).fill_(255)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
