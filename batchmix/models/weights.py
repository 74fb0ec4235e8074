"""Mixtral's weights: how they lie in memory.

Shapes: V vocabulary, D hidden, F expert hidden, E experts, H heads, G kv heads, C head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from batchmix.dtypes import Quantization
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.models.quantized import Empty, Experts, Quantized, Weight, allocated, tensors_of
from batchmix.models.torch_products import prepack


@dataclass
class LayerWeights:
    attention_norm: Tensor  # [D]
    wqkv: Tensor  # [(H + 2G) C, D]: queries, then keys, then values
    wo: Tensor  # [D, H C]
    ffn_norm: Tensor  # [D]
    router: Tensor  # float32 [E, D], whatever the others are: a near-tie rounded away sends a token elsewhere
    w13: Experts  # [E, 2F, D]: gate (w1), then up (w3)
    w2: Experts  # [E, D, F]


@dataclass
class Weights:
    embedding: Tensor  # [V, D]
    layers: list[LayerWeights]
    norm: Tensor  # [D]
    lm_head: Tensor  # [V, D]; the embedding itself where the checkpoint ties them
    fingerprint: str | None = (
        None  # of the tensors that were read, every byte; None on ranks above 0 and for random ones
    )

    def num_bytes(self) -> int:
        """Bytes that the weights take, tied tensors counted once."""
        weights = [self.embedding, self.norm, self.lm_head, *(w for layer in self.layers for w in vars(layer).values())]
        tensors = [tensor for weight in weights for tensor in tensors_of(weight)]
        places = [tensor.data_ptr() if tensor.layout is torch.strided else id(tensor) for tensor in tensors]
        return sum({place: tensor.nbytes for place, tensor in zip(places, tensors, strict=True)}.values())

    def can_be_prepacked(self) -> set[str]:
        """Names of what `prepack` may bring into another layout: not quantised experts, which are widened first, nor a
        lm_head that is the embedding too."""
        experts = {name for name in ("w13", "w2") if not isinstance(getattr(self.layers[0], name), Quantized)}
        return {"wqkv", "wo", *experts} | ({"lm_head"} if self.lm_head is not self.embedding else set())

    def prepack(self, names: set[str]) -> None:
        """Bring what a CPU multiplies into the layout that it multiplies fastest, a tensor at a time."""
        for layer in self.layers:
            for name in names - {"lm_head"}:
                weight = getattr(layer, name)
                setattr(layer, name, prepack(weight) if weight.ndim == 2 else tuple(map(prepack, weight)))
        if "lm_head" in names:
            self.lm_head = prepack(self.lm_head)


class Allocation(Protocol):
    """Where weights lie that do not all lie on one device."""

    def dense(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor for all but experts."""

    def experts(self, layer: int) -> Empty:
        """What allocates the experts of a layer."""


def empty_weights(
    config: MixtralConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
    allocation: Allocation | None = None,
) -> Weights:
    """Weights of the right shapes, not initialised: on the device, but for what `allocation` puts elsewhere.

    `quantization` is the experts'.
    """

    def on_device(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    allocate = on_device if allocation is None else allocation.dense
    places = [
        on_device if allocation is None else allocation.experts(layer) for layer in range(config.num_hidden_layers)
    ]

    def empty(*shape: int) -> Tensor:
        return allocate(shape, dtype)

    def stack(place: Empty, *shape: int) -> Weight:
        return place(shape, dtype) if quantization is None else allocated(shape, quantization, place)

    hidden, experts, width = config.hidden_size, config.num_local_experts, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    embedding = empty(config.vocab_size, hidden)
    return Weights(
        embedding=embedding,
        layers=[
            LayerWeights(
                attention_norm=empty(hidden),
                wqkv=empty(queries + 2 * keys, hidden),
                wo=empty(hidden, queries),
                ffn_norm=empty(hidden),
                router=allocate((experts, hidden), torch.float32),
                w13=stack(place, experts, 2 * width, hidden),
                w2=stack(place, experts, hidden, width),
            )
            for place in places
        ],
        norm=empty(hidden),
        lm_head=embedding if config.tie_word_embeddings else empty(config.vocab_size, hidden),
    )
