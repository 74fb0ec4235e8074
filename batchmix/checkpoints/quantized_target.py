"""Where an expert's weight goes that is kept quantised: quantised as it is read, one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchmix.models.quantized import Quantized, Weight, quantize
from batchmix.models.tensor_parallel import TensorParallel


@dataclass(frozen=True)
class QuantizedTarget:
    """A `TensorTarget` in this process's quantised weights, [N, K].

    Scales come from the whole tensor, before tensor parallelism cuts it, so that codes do not depend on the number of
    slices. A tensor that comes quantised in the place's format is stored as it is.
    """

    shape: tuple[int, ...]  # of the whole tensor
    target: Quantized
    dtype: torch.dtype  # the run dtype, to which weights are rounded first
    tp: TensorParallel
    device: torch.device  # where codes are computed

    def write(self, weight: Weight) -> None:
        if not isinstance(weight, Quantized):
            weight = quantize(weight.to(self.device).to(self.dtype), self.target.format)
        elif weight.format is not self.target.format:
            weight = quantize(weight.dequantize(self.dtype).to(self.device), self.target.format)
        self.target.copy_(self.tp.shard(weight, self.target.shape))
