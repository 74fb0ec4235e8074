"""The tokens of one step, as attention sees them.

Legend: T tokens of a step, L of them generated, H heads, G kv heads, C head dim, W blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

# A layer's attention in one step: rotate queries and keys, write keys and values to the cache, attend.
# (layer, qkv [T, (H + 2G) C]) -> [T, H C].
Attend = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens start..start+length-1 of one prompt, packed at `offset` of the step's tokens."""

    offset: int
    start: int
    length: int
    blocks: Sequence[int]  # the prompt's blocks, in order

    @property
    def last(self) -> int:
        """The place of its last token among the step's."""
        return self.offset + self.length - 1


@dataclass(frozen=True)
class DecodeTokens:
    """The generated tokens of a step: one of each row, then jump-forward tokens, each as a row at its own position,
    then padding. The host may not know yet which rows have ended, nor positions after the first of several steps."""

    positions: Tensor  # int64 [L]: where each token stands in its row
    running: Tensor  # bool [L]: the others write to the scratch block and attend to nothing
    block_table: Tensor  # int32 [L, W]
    host_positions: np.ndarray  # int64 [tokens that are no padding]
    host_blocks: np.ndarray  # int32 [tokens that are no padding, W]


@dataclass(frozen=True)
class StepTokens:
    """The tokens of a step: generated ones first, then packed prompt chunks, then padding."""

    size: int
    decode: DecodeTokens | None
    chunks: Sequence[PrefillChunk] = ()
    shared: object = None  # KV blocks that rows have in common: see `Operators.find_shared`

    def prompt_places(self, block_size: int) -> np.ndarray:
        """Position, block and offset in the block of each prompt token, int64 [3, tokens]."""
        positions = [np.arange(chunk.start, chunk.start + chunk.length) for chunk in self.chunks]
        blocks = [np.asarray(c.blocks)[p // block_size] for c, p in zip(self.chunks, positions, strict=True)]
        position = np.concatenate([np.zeros(0, np.int64), *positions])
        return np.stack((position, np.concatenate([np.zeros(0, np.int64), *blocks]), position % block_size))
