"""How many tokens each expert of each layer has worked on, counted on the device where tokens are routed anyway.

Counted are the tokens of rows: none of what pads a step, but also those of a row that has ended without the host knowing
yet, which runs along for a step or a few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerLoad:
    """What a backend's `moe` adds to."""

    counts: Tensor  # int64 [E]
    tokens: Tensor  # int32 [1]: so many of the step's tokens count, the first ones; padding and free slots follow them


class ExpertLoad:
    """`counts` int64 [layers, E]. Steps outside of a run count nothing: `count_first` says what the next ones hold."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(1, dtype=torch.int32, device=device)
        self._layers = [LayerLoad(counts, self._tokens) for counts in self.counts]

    def __getitem__(self, layer: int) -> LayerLoad:
        return self._layers[layer]

    def count_first(self, tokens: int) -> None:
        """From the next step on its first `tokens` tokens count. The device is not waited for."""
        self._tokens.fill_(tokens)
