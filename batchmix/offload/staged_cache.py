"""A KV cache that lies in host memory, of which the device sees one layer after the other.

Blocks have the same numbers in both, so a layer's blocks are copied in ahead of use in a few long runs. What a step adds
goes back as single tokens, which the host puts into their blocks while the next layers run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchmix.models.backend import Attend, DecodeTokens, PrefillChunk
from batchmix.models.kv_cache import KVCache, words
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.offload.transfer_stream import TransferStream
from batchmix.planning.placement import BUFFERS

_LANDINGS = 3  # layers whose tokens may be on their way back at once
_GAP = 2  # unused blocks that cost less to copy than another copy to begin


class StagedKVCache(KVCache):
    """`keys` and `values` hold BUFFERS layers instead of all. A step may have `max_tokens` tokens.

    Its user has to know on the host where each token of a step stands, so one decode step runs at a time.
    """

    def __init__(
        self,
        config: MixtralConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        link: TransferStream,
        max_tokens: int,
    ) -> None:
        self.num_layers, self.link = config.num_hidden_layers, link
        self._streamed_bytes = 0
        block = (config.num_key_value_heads, block_size, config.head_dim)
        token = (max_tokens, config.num_key_value_heads, config.head_dim)
        self._landings = [[link.host(token, dtype) for _ in "kv"] for _ in range(_LANDINGS)]
        self._hold(*(link.empty((BUFFERS, num_blocks, *block), dtype).zero_() for _ in "kv"))
        self._host = [[link.host((num_blocks, *block), dtype) for _ in "kv"] for _ in range(self.num_layers)]
        self._under_way: deque[tuple[int, Any, list[Tensor], list[Tensor], tuple[Tensor, Tensor]]] = deque()
        self._sent = 0
        self._fetches: deque[Any] = deque()  # of the step that runs, oldest first
        self._runs: list[tuple[int, int]] = []

    @staticmethod
    def landing_bytes(config: MixtralConfig, dtype: torch.dtype, max_tokens: int) -> int:
        """Of the host, beside the blocks."""
        return _LANDINGS * 2 * max_tokens * config.num_key_value_heads * config.head_dim * dtype.itemsize

    @property
    def streamed_bytes(self) -> int:
        return self._streamed_bytes

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer % BUFFERS], self.values[layer % BUFFERS]

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.settle()
        for parts in self._host:
            for part in parts:
                words(part)[list(targets)] = words(part)[list(sources)]

    def around_step(self, attend: Attend, decode: DecodeTokens | None, chunks: Sequence[PrefillChunk]) -> Attend:
        size = self.block_size
        read = [np.asarray(chunk.blocks[: -(-chunk.start // size)], np.int64) for chunk in chunks]
        positions = [np.arange(chunk.start, chunk.start + chunk.length) for chunk in chunks]
        blocks = [np.asarray(chunk.blocks)[p // size] for chunk, p in zip(chunks, positions, strict=True)]
        if decode is not None:
            # Of a row that has ended, which the host may not know, nothing is written there; it goes to its own block.
            position, table = decode.host_positions, decode.host_blocks.astype(np.int64)
            read.append(table[np.arange(table.shape[1]) < -(-position // size)[:, None]])
            positions.insert(0, position)
            blocks.insert(0, table[np.arange(len(table)), position // size])
        return _Staged(self, attend, np.concatenate(read), np.concatenate(blocks), np.concatenate(positions) % size)

    def begin(self, read: np.ndarray) -> None:
        """Begin a step that reads these blocks."""
        self.settle()
        while self._fetches:  # of a step that ended early
            self.link.wait(self._fetches.popleft())
        self._runs = _runs(read)
        for layer in range(min(BUFFERS, self.num_layers)):
            self._fetch(layer)

    def wait(self) -> None:
        """Let the device wait for the next layer's blocks."""
        self.link.wait(self._fetches.popleft())

    def _fetch(self, layer: int) -> None:
        pairs = zip(self.layer(layer), self._host[layer], strict=True)
        copies = [(staged[low:high], host[low:high]) for staged, host in pairs for low, high in self._runs]
        self._streamed_bytes += sum(source.nbytes for _, source in copies)
        self._fetches.append(self.link.copy(copies))

    def done(self, layer: int, places: tuple[Tensor, Tensor], staged: tuple[Tensor, Tensor]) -> None:
        """A layer has run: begin to copy its tokens at `places` (block, offset) to the host, and a later layer's to here.

        `staged`: the places on the device.
        """
        tokens = [words(part)[staged[0], :, staged[1]] for part in self.layer(layer)]  # [T, G, C] each
        landing = [words(part)[: len(places[0])] for part in self._landings[self._sent % _LANDINGS]]
        self._sent += 1
        handle = self.link.copy(list(zip(landing, tokens, strict=True)))
        self._under_way.append((layer, handle, tokens, landing, places))
        if len(self._under_way) == _LANDINGS:
            self._land()
        if layer + BUFFERS < self.num_layers:
            self._fetch(layer + BUFFERS)

    def settle(self) -> None:
        """Wait until the host has all that was sent back."""
        while self._under_way:
            self._land()

    def _land(self) -> None:
        layer, handle, _, landing, (block, offset) = self._under_way.popleft()
        self.link.finish(handle)
        for host, tokens in zip(self._host[layer], landing, strict=True):
            words(host)[block, :, offset] = tokens


class _Staged:
    """A step's attention, each layer's blocks being there when it runs, and its tokens being sent back."""

    def __init__(
        self, cache: StagedKVCache, attend: Attend, read: np.ndarray, blocks: np.ndarray, offsets: np.ndarray
    ) -> None:
        cache.begin(read)
        self._cache, self._attend = cache, attend
        self._places = torch.from_numpy(blocks), torch.from_numpy(offsets)
        device = cache.keys.device
        self._on_device = self._places[0].to(device), self._places[1].to(device)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        self._cache.wait()
        attended = self._attend(layer, qkv)
        self._cache.done(layer, self._places, self._on_device)
        return attended


def _runs(blocks: np.ndarray) -> list[tuple[int, int]]:
    """First and end of runs that hold all `blocks`."""
    blocks = np.unique(blocks)
    if not len(blocks):
        return []
    ends = np.flatnonzero(np.diff(blocks) > _GAP + 1)
    first, last = np.append(0, ends + 1), np.append(ends, len(blocks) - 1)
    return [(int(low), int(high) + 1) for low, high in zip(blocks[first], blocks[last], strict=True)]
