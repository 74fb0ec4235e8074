"""Mixtral's forward pass over a packed list of tokens.

Legend: T tokens (of any number of rows, one after the other), D hidden, H heads, C head dim, V vocabulary. Where tokens
stand in their rows and which keys they see is the business of `Attend`, built once per step by the operators' `attend`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from batchmix.models.backend import Operators
from batchmix.models.expert_load import ExpertLoad
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.models.quantized import Experts
from batchmix.models.step_tokens import Attend
from batchmix.models.tensor_parallel import SINGLE_RANK, TensorParallel
from batchmix.models.weights import Weights


class ExpertStream(Protocol):
    """Brings experts to the device that lie elsewhere."""

    bytes: int
    """Copied so far."""

    def __call__(self, layer: int) -> AbstractContextManager[tuple[Experts, Experts]]:
        """w13 and w2 of a layer, to be used inside of the block."""


class Mixtral:
    """The network: weights, operators, and the order in which they run."""

    def __init__(
        self,
        config: MixtralConfig,
        weights: Weights,
        operators: Operators,
        max_model_len: int,
        tp: TensorParallel = SINGLE_RANK,
        stream: ExpertStream | None = None,
    ) -> None:
        self.config = config  # of this process's slice, as the weights
        self.weights = weights
        self.stream = stream  # of experts that are not on the device; None: all are
        self.tp = tp
        self.ops = operators
        device = weights.embedding.device
        self.expert_load = ExpertLoad(config.num_hidden_layers, config.num_local_experts, device)
        # Half-split rotary angles as in transformers' MixtralRotaryEmbedding, in float32 whatever the weights are.
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        angles = torch.outer(torch.arange(max_model_len).float(), 1.0 / config.rope_theta**exponent)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)  # [max_model_len, C/2]

    def __call__(self, token_ids: Tensor, attend: Attend) -> Tensor:
        """The last hidden states. token_ids int64 [T] -> [T, D]."""
        config, ops, tp = self.config, self.ops, self.tp
        x = self.weights.embedding[token_ids]  # [T, D]
        for index, layer in enumerate(self.weights.layers):
            normed = ops.rms_norm(x, layer.attention_norm, config.rms_norm_eps)
            attended = attend(index, ops.linear(normed, layer.wqkv))  # [T, H C]
            added = tp.all_reduce(ops.linear(attended, layer.wo))
            x, normed = ops.add_rms_norm(x, added, layer.ffn_norm, config.rms_norm_eps)
            with self._experts(index) as (w13, w2):
                x = ops.moe(
                    normed,
                    layer.router,
                    w13,
                    w2,
                    config.num_experts_per_tok,
                    tp.on_rank_0(x),
                    self.expert_load[index],
                )
            x = tp.all_reduce(x)
        return ops.rms_norm(x, self.weights.norm, config.rms_norm_eps)

    @property
    def streamed_bytes(self) -> int:
        """Of weights, copied to the device so far."""
        return 0 if self.stream is None else self.stream.bytes

    def _experts(self, layer: int) -> AbstractContextManager[tuple[Experts, Experts]]:
        """w13 and w2 of a layer, on the device."""
        if self.stream is not None:
            return self.stream(layer)
        return nullcontext((self.weights.layers[layer].w13, self.weights.layers[layer].w2))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> float32 [R, V]."""
        return self.ops.linear(hidden, self.weights.lm_head).float()
