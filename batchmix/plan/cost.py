"""What a data set will cost on a GPU: memory, floating-point operations and hours, by a roofline.

The formulas count matrix products only, 2 operations for each multiply-add. Per token and layer: the projections of
attention, the router and K of E experts; attention itself takes 4 H C operations for each key it looks at. A decode
step reads all weights and the keys and values of its rows once.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchmix.model.config import MixtralConfig
from batchmix.plan.gpus import GPU

# Tokens from which a matrix product takes longer to compute than its weights take to read: b bytes a weight are read in
# b / BW and used in 2 / P for each token, P b / (2 BW) = 184 on an H200 in bfloat16 (790 TFLOP/s and 4.3 TB/s, measured
# once); rounded up to tiles of 128 tokens.
FULL_PRODUCT = 256
EFFICIENCY = 0.6  # share of the roofline assumed to be reached: an assumption, not a measurement


@dataclass(frozen=True)
class Workload:
    """Sums over the rows that can run: `squared_tokens` adds up each prompt's length squared."""

    rows: int
    prompt_tokens: int
    squared_tokens: int
    samples: int  # of all rows
    output_tokens: int  # expected of each sample


@dataclass(frozen=True)
class Cost:
    """Bytes, operations and seconds; `gpus` is how many cards hold the weights and some cache together."""

    weight_bytes: int
    kv_bytes_per_token: int
    gpus: int
    kv_tokens: int  # that fit beside the weights
    rows_at_once: int
    prefill_flops: float
    decode_flops: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def hours(self) -> float:
        """Prefill and decode together."""
        return (self.prefill_seconds + self.decode_seconds) / 3600


def parameters(config: MixtralConfig) -> tuple[int, int]:
    """(all, used by one token) parameters in the layers, norms and embedding left out."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention = config.hidden_size * dim * (2 * heads + 2 * kv_heads)
    router = config.hidden_size * config.num_local_experts
    expert = 3 * config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers
    all_parameters = layers * (attention + router + config.num_local_experts * expert)
    return all_parameters, layers * (attention + router + config.num_experts_per_tok * expert)


def weight_bytes(config: MixtralConfig, bytes_per_weight: int) -> int:
    """Bytes of all weights; tied embeddings count once."""
    tables = 1 if config.tie_word_embeddings else 2
    return (parameters(config)[0] + tables * config.vocab_size * config.hidden_size) * bytes_per_weight


def full_step(config: MixtralConfig) -> int:
    """Tokens of a step from which reading the weights is no loss: FULL_PRODUCT for each expert, K of E a token."""
    return FULL_PRODUCT * config.num_local_experts // config.num_experts_per_tok


def kv_bytes_per_token(config: MixtralConfig, bytes_per_value: int) -> int:
    """Keys and values of one token over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_value


def kv_room(config: MixtralConfig, gpu: GPU, share: float, max_model_len: int, itemsize: int) -> tuple[int, int]:
    """(GPUs, KV tokens): how many cards are needed to hold the weights and a row, and what cache that leaves."""
    weights, per_token = weight_bytes(config, itemsize), kv_bytes_per_token(config, itemsize)
    usable = gpu.memory_gb * 1e9 * share
    gpus = 1
    while gpus * usable - weights < per_token * max_model_len:
        gpus *= 2
    return gpus, int((gpus * usable - weights) // per_token)


def estimate(
    config: MixtralConfig,
    gpu: GPU,
    work: Workload,
    *,
    share: float,
    max_model_len: int,
    max_num_seqs: int,
    itemsize: int,
) -> Cost:
    """The cost of `work`. `share` of the memory is used; `itemsize` is the bytes of a weight and of a cached value."""
    gpus, kv_tokens = kv_room(config, gpu, share, max_model_len, itemsize)
    samples = work.samples
    mean_prompt = work.prompt_tokens / max(1, work.rows)
    # Half of a row's answer is there on average, since rows start and end at different times.
    mean_context = mean_prompt + work.output_tokens / 2
    rows_at_once = max(1, min(max_num_seqs, samples, int(kv_tokens / max(1.0, mean_context))))
    active = parameters(config)[1]
    head = 2 * config.vocab_size * config.hidden_size
    per_key = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    prefill = 2.0 * active * work.prompt_tokens + per_key * work.squared_tokens / 2 + head * work.rows
    output = samples * work.output_tokens
    decode = output * (2.0 * active + head + per_key * mean_context)
    peak, bandwidth = gpus * gpu.tflops * 1e12 * EFFICIENCY, gpus * gpu.bandwidth_gbs * 1e9 * EFFICIENCY
    weights, per_token = weight_bytes(config, itemsize), kv_bytes_per_token(config, itemsize)
    steps = output / rows_at_once
    read = steps * weights + output * mean_context * per_token
    return Cost(
        weights, per_token, gpus, kv_tokens, rows_at_once, prefill, decode, prefill / peak,
        max(decode / peak, read / bandwidth),
    )  # fmt: skip
