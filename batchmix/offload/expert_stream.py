"""Experts that are not on the device: which layers' they are, and how they come to it in time.

All of a layer's experts are on the device or none are. Streaming the same share of every layer's would move the same
bytes; whole layers need no split products, and as streamed layers stand evenly among the others, copies go on while those
compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchmix.models.quantized import Empty, Experts, Quantized, Weight, allocated, tensors_of
from batchmix.models.weights import LayerWeights
from batchmix.offload.transfer_stream import TransferStream
from batchmix.planning.placement import BUFFERS


def spread(streamed: int, layers: int) -> tuple[int, ...]:
    """Which of so many layers are streamed: every n-th, the last among them."""
    return tuple((place + 1) * layers // streamed - 1 for place in range(streamed))


@dataclass(frozen=True)
class Offload:
    """Where weights lie: the experts of `streamed` layers on the host, all others on the device."""

    link: TransferStream
    streamed: tuple[int, ...]  # ascending
    buffers: int = BUFFERS

    def dense(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the device."""
        return self.link.empty(shape, dtype)

    def experts(self, layer: int) -> Empty:
        """What allocates the experts of a layer."""
        return self.link.host if layer in self.streamed else self.link.empty


class ExpertStream:
    """Gives each layer's experts on the device; those that are not there are copied ahead of use, around a ring.

    Layers must be asked for in order, again and again. Where a step has ended early (an error) the ring starts anew.
    """

    def __init__(self, layers: Sequence[LayerWeights], offload: Offload) -> None:
        self.bytes = 0  # copied so far
        self._layers, self._link, self._order = layers, offload.link, offload.streamed
        buffers = min(offload.buffers, len(self._order))
        model = [(layers[self._order[0]].w13, layers[self._order[0]].w2)] * buffers
        self._ring = [(_empty_like(w13, self._link), _empty_like(w2, self._link)) for w13, w2 in model]
        self._tickets: deque[Any] = deque()
        self._begin(0)

    @contextmanager
    def __call__(self, layer: int) -> Iterator[tuple[Experts, Experts]]:
        """w13 and w2 of a layer, to be used inside of the block."""
        weights = self._layers[layer]
        if layer not in self._order:
            yield weights.w13, weights.w2
            return
        if self._order[self._used % len(self._order)] != layer:
            for handle in self._tickets:  # the old copies before the new ones into the same buffers
                self._link.wait(handle)
            self._begin(self._order.index(layer))
        self._link.wait(self._tickets[0])
        yield self._ring[self._used % len(self._ring)]
        self._tickets.popleft()
        self._used += 1
        self._fetch(self._used + len(self._ring) - 1)

    def _begin(self, place: int) -> None:
        self._used = place  # layers streamed before the next one: the n-th comes in buffer n modulo their number
        self._tickets.clear()
        for ahead in range(len(self._ring)):
            self._fetch(place + ahead)

    def _fetch(self, number: int) -> None:
        """Copy the number-th streamed layer; its buffer must have been used for the last time."""
        layer = self._layers[self._order[number % len(self._order)]]
        w13, w2 = self._ring[number % len(self._ring)]
        pairs = list(zip(tensors_of(w13) + tensors_of(w2), tensors_of(layer.w13) + tensors_of(layer.w2), strict=True))
        self._tickets.append(self._link.copy(pairs))
        self.bytes += sum(source.nbytes for _, source in pairs)


def _empty_like(weight: Experts, link: TransferStream) -> Weight:
    assert not isinstance(weight, tuple)
    if isinstance(weight, Quantized):
        return allocated(weight.shape, weight.format, link.empty)
    return link.empty(weight.shape, weight.dtype)
