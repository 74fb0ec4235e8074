"""How bytes get from a mapped file into a tensor: straight on the CPU, through pinned host memory to a GPU.

Both go piece by piece, so that what rounding or pinning takes on the host does not grow with the tensor.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

PIECE_BYTES = 16 << 20  # of a target; a copy to a GPU of so many takes 0.3 ms over PCIe 5, its launch 0.01 ms
SLOTS = 16  # two for each reading thread: one is filled while the other is on its way
Wait = Callable[[], object]


class Staging(Protocol):
    """Copies into weights. `put` may be called from several threads, for tensors that do not overlap."""

    def put(self, target: Tensor, source: Tensor, dtype: torch.dtype) -> None:
        """Copy `source` (on the host, of the target's shape) into `target`, rounded to `dtype` on the way."""

    def finish(self) -> None:
        """Returns when everything that was put is there."""


class Direct:
    """To tensors on the CPU."""

    def put(self, target: Tensor, source: Tensor, dtype: torch.dtype) -> None:
        for place, piece in pieces(target, source, PIECE_BYTES):
            place.copy_(piece.to(dtype))

    def finish(self) -> None:
        pass


class Ring:
    """Through a fixed number of host buffers, each used again only when its last copy is through.

    `send(target, buffer)` starts a copy to the device and returns what waits for its end.
    """

    def __init__(self, buffers: list[Tensor], send: Callable[[Tensor, Tensor], Wait]) -> None:
        self._send = send
        self._count = len(buffers)
        self._size = buffers[0].nbytes
        self._free: queue.SimpleQueue[tuple[Tensor, Wait]] = queue.SimpleQueue()  # longest on its way first
        for buffer in buffers:
            self._free.put((buffer, lambda: None))

    def put(self, target: Tensor, source: Tensor, dtype: torch.dtype) -> None:
        for place, piece in pieces(target, source, self._size):
            buffer, wait = self._free.get()
            try:
                wait()
                staged = buffer[: place.nbytes].view(place.dtype).view(place.shape)
                staged.copy_(piece.to(dtype))
                wait = self._send(place, staged)
            finally:  # other threads wait for a buffer, whatever happens to this one
                self._free.put((buffer, wait))

    def finish(self) -> None:
        for _ in range(self._count):
            self._free.get()[1]()


def open_staging(device: torch.device) -> Staging:
    """What copies to this device."""
    return Direct() if device.type == "cpu" else _cuda_ring(device)


def _cuda_ring(device: torch.device) -> Ring:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))  # whose earlier work may still use the targets' memory

    def send(target: Tensor, staged: Tensor) -> Wait:
        with torch.cuda.stream(stream):
            target.copy_(staged, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(stream)
        return done.synchronize

    return Ring([torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)], send)


def pieces(target: Tensor, source: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching parts of two tensors of one shape: as many rows as fit into `size` bytes of the target, at least one."""
    rows = max(1, size // max(1, target[:1].nbytes))
    for start in range(0, len(target), rows):
        yield target[start : start + rows], source[start : start + rows]
