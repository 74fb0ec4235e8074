"""One model in several processes, each with a slice of every layer (tensor parallelism).

Each process has some of the attention heads (queries by their kv head) and some of every expert's hidden width, so its
attention and its experts give a part of a sum over all processes. Norms, router, embedding and lm_head are whole
everywhere: together they are 1 % of Mixtral, and gathering logits would cost what the smaller product saves.

The processes run the same engine in lock step: same batches, and so same decisions, as these depend on nothing but
prompts and tokens. Tokens are those of rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from batchmix.dtypes import Quantization
from batchmix.errors import BatchmixError
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.models.quantized import Quantized, check_shape

_Weight = TypeVar("_Weight", Tensor, Quantized)
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 gave it a new name


@dataclass(frozen=True)
class TensorParallel:
    """Which slice this process has. Of more than one, torch.distributed's default group joins them."""

    rank: int = 0
    size: int = 1

    def check(self, config: MixtralConfig, quantization: Quantization | None = None) -> None:
        """BatchmixError where the model cannot be cut into so many slices."""
        for number, what in (
            (config.num_key_value_heads, "kv heads"),
            (config.intermediate_size, "columns of an expert"),
        ):
            if number % self.size:
                raise BatchmixError(
                    f"model.tensor_parallel_size={self.size}: must divide the model's {number} {what};"
                    " engine.data_parallel_size runs whole models side by side"
                )

        check_shape(quantization, self.slice_config(config), f"model.tensor_parallel_size={self.size}: ")

    def slice_config(self, config: MixtralConfig) -> MixtralConfig:
        """The shape of one slice."""
        return replace(
            config,
            num_attention_heads=config.num_attention_heads // self.size,
            num_key_value_heads=config.num_key_value_heads // self.size,
            intermediate_size=config.intermediate_size // self.size,
        )

    def shard(self, tensor: _Weight, shape: torch.Size) -> _Weight:
        """This process's part of a whole tensor: of `shape`, along the one dimension in which that is smaller."""
        for dim, length in enumerate(shape):
            if tensor.shape[dim] != length:
                return tensor.narrow(dim, self.rank * length, length)
        return tensor

    def all_reduce(self, part: Tensor) -> Tensor:
        """The sum of all processes' parts [T, D], modified in place, in the order of their ranks, rounded as `part` is.

        T * D must be a multiple of `size`. A ring's own order would depend on where in the step a token stands, and
        its bits with that; so of more than two parts each process adds up a piece and then all gather the pieces, which
        moves as many bytes as a ring does.
        """
        if self.size == 1:
            return part
        if self.size == 2:
            dist.all_reduce(part)  # a + b = b + a
            return part
        parts = torch.empty_like(part)
        dist.all_to_all_single(parts.view(-1), part.view(-1))
        pieces = parts.view(self.size, -1)
        total = pieces[0].float()
        for piece in pieces[1:]:
            total += piece
        _gather(parts.view(-1), total.to(part.dtype))
        return parts

    def on_rank_0(self, x: Tensor) -> Tensor:
        """What each process contributes of `x` to a sum over all, so that it counts once."""
        return x if self.rank == 0 else torch.zeros_like(x)

    def broadcast(self, tokens: Tensor) -> Tensor:
        """Rank 0's tokens, in the place of everybody's."""
        if self.size > 1:
            dist.broadcast(tokens, 0)
        return tokens

    def all_reduce_min(self, number: int) -> int:
        """The smallest of what the processes give."""
        if self.size == 1:
            return number
        least = torch.tensor(number)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)


SINGLE_RANK = TensorParallel()
