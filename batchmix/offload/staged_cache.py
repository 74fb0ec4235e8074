"""A KV cache that lies in host memory, of which the device sees one layer after the other.

Blocks have the same numbers in both, so a layer's blocks are copied in ahead of use in a few long runs. What a step
adds goes back as single tokens, which the host puts into their blocks while the next layers run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchmix.models.kv_cache import KVCache, words
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.models.step_tokens import Attend, StepTokens
from batchmix.offload.transfer_stream import TransferStream
from batchmix.planning.placement import BUFFERS

_LANDINGS = 3  # layers whose tokens may be on their way back at once
_GAP = 2  # unused blocks that cost less to copy than another copy to begin


class StagedKVCache(KVCache):
    """`keys` and `values` hold BUFFERS layers instead of all. A step may have `max_tokens` tokens, and one decode step
    runs at a time: the host has to know where each token stands."""

    def __init__(
        self, config: MixtralConfig, num_blocks: int, block_size: int, dtype: torch.dtype, link: TransferStream,
        max_tokens: int,
    ) -> None:  # fmt: skip
        self.num_layers, self.link = config.num_hidden_layers, link
        block = (num_blocks, config.num_key_value_heads, block_size, config.head_dim)
        token = (max_tokens, config.num_key_value_heads, config.head_dim)
        self._landings = [[link.host(token, dtype) for _ in "kv"] for _ in range(_LANDINGS)]
        self._hold(*(link.empty((BUFFERS, *block), dtype).zero_() for _ in "kv"))
        self._host = [[link.host(block, dtype) for _ in "kv"] for _ in range(self.num_layers)]
        self._fetches: deque[Any] = deque()  # copies to the device in the step that runs, by layer
        # Copies to the host, oldest first: layer, handle, the copied tokens, where they land, their blocks and offsets.
        self._under_way: deque[tuple[int, Any, list[Tensor], list[Tensor], tuple[Tensor, ...]]] = deque()
        self._sent = 0

    @staticmethod
    def landing_bytes(config: MixtralConfig, dtype: torch.dtype, max_tokens: int) -> int:
        """Of the host, beside the blocks."""
        return _LANDINGS * 2 * max_tokens * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer % BUFFERS], self.values[layer % BUFFERS]

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._settle()
        for parts in self._host:
            for part in parts:
                words(part)[list(targets)] = words(part)[list(sources)]

    def around_step(self, attend: Attend, step: StepTokens) -> Attend:
        """`attend`, each layer's blocks being there when it runs, and its tokens being sent back."""
        size = self.block_size
        read = [np.asarray(chunk.blocks[: -(-chunk.start // size)], np.int64) for chunk in step.chunks]
        _, *written = step.prompt_places(size)  # blocks, and offsets in them
        if step.decode is not None:
            # Of a row that has ended, which the host may not know, the new token goes to the row's own block, unread.
            position, table = step.decode.host_positions, step.decode.host_blocks.astype(np.int64)
            read.append(table[np.arange(table.shape[1]) < -(-position // size)[:, None]])
            own = table[np.arange(len(table)), position // size], position % size
            written = [np.concatenate(pair) for pair in zip(own, written, strict=True)]
        places = tuple(map(torch.from_numpy, written))
        on_device = tuple(place.to(self.keys.device) for place in places)
        self._settle()
        while self._fetches:  # of a step that ended early
            self.link.wait(self._fetches.popleft())
        runs = _runs(np.concatenate(read))
        for layer in range(min(BUFFERS, self.num_layers)):
            self._fetch(layer, runs)

        def staged(layer: int, qkv: Tensor) -> Tensor:
            self.link.wait(self._fetches.popleft())
            attended = attend(layer, qkv)
            self._send(layer, places, on_device)
            if layer + BUFFERS < self.num_layers:
                self._fetch(layer + BUFFERS, runs)
            return attended

        return staged

    def _fetch(self, layer: int, runs: list[tuple[int, int]]) -> None:
        """Begin to copy a layer's blocks to the device."""
        pairs = zip(self.layer(layer), self._host[layer], strict=True)
        copies = [(staged[low:high], host[low:high]) for staged, host in pairs for low, high in runs]
        self.streamed_bytes += sum(source.nbytes for _, source in copies)
        self._fetches.append(self.link.copy(copies))

    def _send(self, layer: int, places: tuple[Tensor, ...], on_device: tuple[Tensor, ...]) -> None:
        """Begin to copy a layer's tokens at these blocks and offsets to the host."""
        tokens = [words(part)[on_device[0], :, on_device[1]] for part in self.layer(layer)]  # [T, G, C] each
        landing = [words(part)[: len(places[0])] for part in self._landings[self._sent % _LANDINGS]]
        self._sent += 1
        handle = self.link.copy(list(zip(landing, tokens, strict=True)))
        self._under_way.append((layer, handle, tokens, landing, places))
        if len(self._under_way) == _LANDINGS:
            self._land()

    def _settle(self) -> None:
        """Wait until the host has all that was sent back."""
        while self._under_way:
            self._land()

    def _land(self) -> None:
        layer, handle, _, landing, (block, offset) = self._under_way.popleft()
        self.link.finish(handle)
        for host, tokens in zip(self._host[layer], landing, strict=True):
            words(host)[block, :, offset] = tokens


def _runs(blocks: np.ndarray) -> list[tuple[int, int]]:
    """First and end of runs that hold all `blocks`."""
    blocks = np.unique(blocks)
    if not len(blocks):
        return []
    ends = np.flatnonzero(np.diff(blocks) > _GAP + 1)
    first, last = np.append(0, ends + 1), np.append(ends, len(blocks) - 1)
    return [(int(low), int(high) + 1) for low, high in zip(blocks[first], blocks[last], strict=True)]
