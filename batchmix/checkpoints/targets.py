"""From a checkpoint's tensors to where they lie in memory: the two sides of loading, and the plain place.

A `TensorSource` gives a checkpoint's tensors under the hub's names and in the hub's shapes, whatever its files are (one
w1, w2, w3 per expert, rotary halves: see `layouts.py`). A `TensorTarget` takes one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from batchmix.checkpoints.staging import Staging
from batchmix.models.tensor_parallel import TensorParallel

if TYPE_CHECKING:
    from batchmix.models.quantized import Quantized


class TensorSource(Protocol):
    """A checkpoint's tensors, read lazily. All methods may be called from several threads."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape from the files' headers alone, in the order in which they are best read."""

    def read(self, name: str) -> Tensor | Quantized:
        """One whole tensor: a view of the mapped file where that can be, so that only what is used of it is read."""

    def release(self, name: str) -> None:
        """This tensor has been used, so its mapped pages need not stay in this process."""


class TensorTarget(Protocol):
    """Where one tensor of a checkpoint goes. Tensors of different places may be written at the same time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor, as the source gives it."""

    def write(self, tensor: Tensor | Quantized) -> None:
        """Cut this process's part out of the whole tensor, round it to the run dtype and store it."""


@dataclass(frozen=True)
class DenseTarget:
    """A tensor stored as it is: `target` is its place in this process's weights, on any device."""

    shape: tuple[int, ...]
    target: Tensor  # as `shape`, but for the one dimension that tensor parallelism cuts
    dtype: torch.dtype  # the run dtype, to which weights are rounded whatever they are stored as
    tp: TensorParallel
    staging: Staging

    def write(self, tensor: Tensor | Quantized) -> None:
        if not isinstance(tensor, Tensor):
            tensor = tensor.dequantize(self.dtype)
        self.staging.put(self.target, self.tp.shard(tensor, self.target.shape), self.dtype)
