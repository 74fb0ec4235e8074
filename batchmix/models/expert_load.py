"""Which tokens of a step are real, and how many of them each expert of each layer has worked on.

What pads a step (free slots of a captured one, rows up to a backend's `row_tile`) reaches no expert, and is not counted. A
row that has ended without the host knowing yet runs along for a step or a few, and is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerLoad:
    """What a backend's `moe` reads and adds to."""

    counts: Tensor  # int64 [E]: grows by the tokens of each expert
    num_valid: Tensor  # int32 [1], on the device: the step's first tokens are real, those behind them padding


class ExpertLoad:
    """`counts` int64 [layers, E], on the device, as every step's `num_valid`."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self._num_valid = torch.zeros(1, dtype=torch.int32, device=device)
        self._layers = [LayerLoad(counts, self._num_valid) for counts in self.counts]
        self._in_run = False

    def __getitem__(self, layer: int) -> LayerLoad | None:
        """None outside of a run, where all tokens are real."""
        return self._layers[layer] if self._in_run else None

    def set_num_valid(self, tokens: int) -> None:
        """From the next step on the first `tokens` tokens are real, and counted. The device is not waited for."""
        self._num_valid.fill_(tokens)
        self._in_run = True

    def reset(self) -> None:
        """Forget what was counted: steps are outside of a run again."""
        self.counts.zero_()
        self._in_run = False
