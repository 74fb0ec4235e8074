"""The least time that given rows can take on a device of given ceilings, by serial steps and by ones that overlap.

docs/performance.md derives both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchmix.models.mixtral_config import MixtralConfig


@dataclass(frozen=True)
class Device:
    """What limits the work: bytes a second, operations a second, and the tokens that the KV cache could hold."""

    bandwidth: float
    flops: float
    kv_tokens: int
    most_rows: int  # decoded together
    expert_flops: float | None = None  # of products with quantised experts, where another rate


@dataclass(frozen=True)
class Roofline:
    """Seconds at best, and the rows decoded together that they take."""

    prefill_seconds: float
    decode_seconds: float
    rows_at_once: float
    overlapped_seconds: float  # of steps that mix prompts and answers: all bytes move while all operations run

    @property
    def seconds(self) -> float:
        """Of prefill and decode one after the other."""
        return self.prefill_seconds + self.decode_seconds


def roofline(
    model: MixtralConfig,
    itemsize: int,
    prompts: Sequence[int],
    answers: Sequence[int],
    shared: int,
    device: Device,
    *,
    expert_itemsize: float | None = None,
    kv_itemsize: int | None = None,
) -> Roofline:
    """Of prompts and answers of so many tokens each, the first `shared` tokens of every prompt being the same.

    `itemsize`: bytes of a weight and, if not given, of an expert's weight with its scales and of a cached value.
    """
    layers, hidden = model.num_hidden_layers, model.hidden_size
    heads, kv_heads, dim = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    expert = layers * 3 * hidden * model.intermediate_size
    projections = layers * (hidden * dim * (2 * heads + 2 * kv_heads) + hidden * model.num_local_experts)
    head = model.vocab_size * hidden
    weights = (model.num_local_experts * expert, projections, head)  # parameters that a step reads
    active = (model.num_experts_per_tok * expert, projections, head)  # parameters that a token is multiplied with
    per_key = 4.0 * layers * heads * dim  # operations for each (query, key)
    sizes = (expert_itemsize or itemsize, itemsize, itemsize)
    rates = (device.expert_flops or device.flops, device.flops, device.flops)
    kv_bytes = 2.0 * layers * kv_heads * dim * (kv_itemsize or itemsize)

    tokens = shared + sum(length - shared for length in prompts)
    pairs = shared**2 / 2 + sum((length**2 - shared**2) / 2 for length in prompts)
    computing = 2.0 * active[0] * tokens / rates[0]
    computing += (2.0 * active[1] * tokens + 2.0 * head * len(prompts) + per_key * pairs) / device.flops
    reading = sum(number * size for number, size in zip(weights, sizes, strict=True)) / device.bandwidth
    prefill = max(computing, reading)

    steps_of = [answer - 1 for answer in answers]  # prefill gives the first token
    output = sum(steps_of)
    if not output:
        return Roofline(prefill, 0.0, 0.0, prefill)
    own_keys = sum(n * (length - shared) + n * (n + 1) / 2 for length, n in zip(prompts, steps_of, strict=True))
    rows_at_once = min(device.most_rows, len(prompts), max(1.0, (device.kv_tokens - shared) / (own_keys / output)))
    steps = max(output / rows_at_once, max(steps_of))
    rows = output / steps
    decode = steps * sum(
        max(read * size / device.bandwidth, 2.0 * used * rows / rate)
        for read, used, size, rate in zip(weights, active, sizes, rates, strict=True)
    )
    read = (own_keys + steps * shared) * kv_bytes / device.bandwidth
    attending = (own_keys + output * shared) * per_key / device.flops
    decode += max(read, attending)

    computing += attending + output * sum(2.0 * used / rate for used, rate in zip(active, rates, strict=True))
    return Roofline(prefill, decode, rows, max(computing, steps * reading + read))
