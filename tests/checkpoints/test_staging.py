"""Copies into weights, and the ring of host buffers with a device that is slow and looks at a buffer late."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from batchmix.checkpoints.staging import Direct, Ring, pieces


class SlowDevice:
    """Copies from a buffer some time after it was told to, in the order of the calls, as a stream does."""

    def __init__(self) -> None:
        self.on_their_way = self.most = 0
        self._pool = ThreadPoolExecutor(1)
        self._delay = random.Random(0)
        self._lock = threading.Lock()

    def send(self, target: Tensor, staged: Tensor) -> Callable[[], object]:
        with self._lock:
            self.on_their_way += 1
            self.most = max(self.most, self.on_their_way)
        return self._pool.submit(self._copy, target, staged).result

    def _copy(self, target: Tensor, staged: Tensor) -> None:
        time.sleep(self._delay.random() * 0.002)
        target.copy_(staged)
        with self._lock:
            self.on_their_way -= 1


def test_the_ring_fills_no_buffer_that_is_on_its_way() -> None:
    device = SlowDevice()
    ring = Ring([torch.empty(640, dtype=torch.uint8) for _ in range(3)], device.send)
    sources = [torch.randn(30, 20) for _ in range(12)]  # 8 rows to a buffer
    targets = [torch.zeros(30, 20) for _ in sources]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(ring.put, t, s, torch.float32) for t, s in zip(targets, sources, strict=True)]:
            done.result()
    ring.finish()
    assert device.on_their_way == 0
    assert 1 < device.most <= 3
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


def test_a_failing_copy_does_not_keep_its_buffer() -> None:
    def send(target: Tensor, staged: Tensor) -> Callable[[], object]:
        raise RuntimeError("the device is gone")

    ring = Ring([torch.empty(640, dtype=torch.uint8)], send)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="is gone"):
            ring.put(torch.zeros(2, 4), torch.ones(2, 4), torch.float32)


@pytest.mark.parametrize("through_ring", [False, True])
def test_weights_are_rounded_on_the_way(through_ring: bool) -> None:
    device = SlowDevice()
    staging = Ring([torch.empty(4096, dtype=torch.uint8)], device.send) if through_ring else Direct()
    source = torch.randn(33, 17)[:, 3:14]  # a slice of columns, as tensor parallelism takes
    target = torch.zeros(33, 11)
    staging.put(target, source, torch.bfloat16)
    staging.finish()
    assert torch.equal(target, source.bfloat16().float())


def test_pieces_cover_a_tensor_once() -> None:
    for shape in ((1,), (7,), (100, 3), (3, 100), (64, 64)):
        target = torch.zeros(shape)
        for place, piece in pieces(target, torch.ones(shape), 512):
            assert place.shape == piece.shape
            assert place.nbytes <= max(512, target[:1].nbytes)
            place += piece
        assert torch.equal(target, torch.ones(shape)), shape
