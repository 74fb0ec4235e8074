"""How large a Mixtral is, and how many operations it takes: matrix products only, 2 for each multiply-add.

Per token and layer: the projections of attention, the router and K of E experts; attention itself takes 4 H C operations
for each key it looks at.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchmix.dtypes import Quantization
from batchmix.models.mixtral_config import MixtralConfig

# Bytes of an expert's weight, of its codes and of the float32 scales: one for an output channel, or for 128 of its inputs.
_CODES = {Quantization.fp8: 1.0, Quantization.int8: 1.0, Quantization.int4: 0.5}
_INT4_GROUP = 128


@dataclass(frozen=True)
class Footprint:
    """Bytes and operations of one model."""

    layers: int
    fixed_bytes: int  # all weights but experts
    layer_bytes: int  # the experts of one layer
    kv_bytes: int  # of one token, over all layers
    token_flops: float  # of one token in all layers, without attention's scores
    expert_flops: float  # those of them that are experts'
    key_flops: float  # for each key that a token looks at
    head_flops: float  # of one token's logits

    @property
    def weight_bytes(self) -> int:
        """Of the whole model."""
        return self.fixed_bytes + self.layers * self.layer_bytes


def footprint(
    config: MixtralConfig, itemsize: int, quantization: Quantization | None = None, kv_itemsize: int | None = None
) -> Footprint:
    """`itemsize`: bytes of a weight that is not quantised, which only experts' are, and, if not given, of a cached value."""
    total, active = parameters(config)
    experts = config.num_local_experts * 3 * config.hidden_size * config.intermediate_size
    others = total - config.num_hidden_layers * experts
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    return Footprint(
        layers=config.num_hidden_layers,
        fixed_bytes=(others + tables) * itemsize,
        layer_bytes=_experts_bytes(config, itemsize, quantization),
        kv_bytes=kv_bytes_per_token(config, kv_itemsize or itemsize),
        token_flops=2.0 * active,
        expert_flops=2.0 * config.num_hidden_layers * experts * config.num_experts_per_tok / config.num_local_experts,
        key_flops=4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim,
        head_flops=2.0 * config.vocab_size * config.hidden_size,
    )


def parameters(config: MixtralConfig) -> tuple[int, int]:
    """(all, used by one token) parameters in the layers, norms and embedding left out."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention = config.hidden_size * dim * (2 * heads + 2 * kv_heads)
    router = config.hidden_size * config.num_local_experts
    expert = 3 * config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers
    all_parameters = layers * (attention + router + config.num_local_experts * expert)
    return all_parameters, layers * (attention + router + config.num_experts_per_tok * expert)


def weight_bytes(config: MixtralConfig, itemsize: int, quantization: Quantization | None = None) -> int:
    """Bytes of all weights; tied embeddings count once."""
    return footprint(config, itemsize, quantization).weight_bytes


def kv_bytes_per_token(config: MixtralConfig, bytes_per_value: int) -> int:
    """Keys and values of one token over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_value


def _experts_bytes(config: MixtralConfig, itemsize: int, quantization: Quantization | None) -> int:
    hidden, width = config.hidden_size, config.intermediate_size
    weights, channels = 3 * hidden * width, 2 * width + hidden
    if quantization is None:
        return config.num_local_experts * weights * itemsize
    scales = weights // _INT4_GROUP if quantization is Quantization.int4 else channels
    return config.num_local_experts * (int(weights * _CODES[quantization]) + 4 * scales)
