"""Mixtral's forward pass over a packed list of tokens.

Legend: T tokens (of any number of rows, one after the other), D hidden, F expert hidden, E experts, K experts per
token, H heads, G kv heads, C head dim, V vocabulary. Which tokens see which keys is the business of `Attend`,
built once per step for the whole batch by the operators' `prefill` and `decode`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from batchmix.model.config import MixtralConfig
from batchmix.model.shards import ALONE, Shards
from batchmix.model.weights import Weights


class Attend(Protocol):
    """Write this step's keys and values to the cache and attend."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, H, C], k and v [T, G, C] -> [T, H, C]."""


class Operators(Protocol):
    """The operators that a backend brings; everything above them is shared by all backends."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, D], weight [D] -> [T, D]."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, in], weight [out, in] -> [T, out]."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, heads, C], cos and sin [T, C/2] -> [T, heads, C]."""

    def moe(self, x: Tensor, router: Tensor, w13: Tensor, w2: Tensor, top_k: int) -> Tensor:
        """x [T, D], router float32 [E, D], w13 [E, 2F, D], w2 [E, D, F] -> [T, D]."""


class Mixtral:
    """The network: weights, operators, and the order in which they run."""

    def __init__(
        self,
        config: MixtralConfig,
        weights: Weights,
        operators: Operators,
        max_model_len: int,
        shards: Shards = ALONE,
    ) -> None:
        self.config = config  # of this process's slice, as the weights
        self.weights = weights
        self.shards = shards
        self.ops = operators
        device = weights.embedding.device
        # Half-split rotary angles as in transformers' MixtralRotaryEmbedding, in float32 whatever the weights are.
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        angles = torch.outer(torch.arange(max_model_len).float(), 1.0 / config.rope_theta**exponent)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)  # [max_model_len, C/2]

    def __call__(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The last hidden states. token_ids and positions int64 [T] -> [T, D]."""
        config, ops = self.config, self.ops
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        cos, sin = self.cos[positions], self.sin[positions]  # [T, C/2]
        x = self.weights.embedding[token_ids]  # [T, D]
        for index, layer in enumerate(self.weights.layers):
            normed = ops.rms_norm(x, layer.attention_norm, config.rms_norm_eps)
            qkv = ops.linear(normed, layer.wqkv).view(len(x), heads + 2 * kv_heads, dim)
            q, k = torch.split(ops.rotate(qkv[:, : heads + kv_heads], cos, sin), [heads, kv_heads], dim=1)
            attended = attend(index, q, k, qkv[:, heads + kv_heads :])  # [T, H, C]
            x = x + self.shards.add_up(ops.linear(attended.reshape(len(x), heads * dim), layer.wo))
            normed = ops.rms_norm(x, layer.ffn_norm, config.rms_norm_eps)
            x = x + self.shards.add_up(ops.moe(normed, layer.router, layer.w13, layer.w2, config.num_experts_per_tok))
        return ops.rms_norm(x, self.weights.norm, config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> float32 [R, V]."""
        return self.ops.linear(hidden, self.weights.lm_head).float()
