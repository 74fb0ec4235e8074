"""Mixtral's weights: how they lie in memory, and where in them each tensor of a checkpoint goes.

Shapes: V vocabulary, D hidden, F expert hidden, E experts, H heads, G kv heads, C head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from batchmix.config import ModelFormat
from batchmix.model.checkpoint import Checkpoint, check_index
from batchmix.model.config import MixtralConfig
from batchmix.model.layouts import HubNames, choose_layout, expert_name, fused, hub, hub_shapes, mistral, stacked
from batchmix.model.places import DensePlace, Place
from batchmix.model.reading import fill
from batchmix.model.shards import ALONE, Shards
from batchmix.model.sources import TensorFiles
from batchmix.model.staging import Staging, open_staging
from batchmix.report.loading import LoadProgress


@dataclass
class LayerWeights:
    attention_norm: Tensor  # [D]
    wqkv: Tensor  # [(H + 2G) C, D]: queries, then keys, then values
    wo: Tensor  # [D, H C]
    ffn_norm: Tensor  # [D]
    router: Tensor  # float32 [E, D], whatever the others are: a near-tie rounded away sends a token elsewhere
    w13: Tensor  # [E, 2F, D]: gate (w1), then up (w3)
    w2: Tensor  # [E, D, F]


@dataclass
class Weights:
    embedding: Tensor  # [V, D]
    layers: list[LayerWeights]
    norm: Tensor  # [D]
    lm_head: Tensor  # [V, D]; the embedding itself where the checkpoint ties them

    def num_bytes(self) -> int:
        """Bytes that the weights take, tied tensors counted once."""
        tensors = {t.data_ptr(): t.nbytes for layer in self.layers for t in vars(layer).values()}
        tensors |= {t.data_ptr(): t.nbytes for t in (self.embedding, self.norm, self.lm_head)}
        return sum(tensors.values())


def empty_weights(config: MixtralConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Weights of the right shapes, not initialised."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

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
                router=torch.empty(experts, hidden, dtype=torch.float32, device=device),
                w13=empty(experts, 2 * width, hidden),
                w2=empty(experts, hidden, width),
            )
            for _ in range(config.num_hidden_layers)
        ],
        norm=empty(hidden),
        lm_head=embedding if config.tie_word_embeddings else empty(config.vocab_size, hidden),
    )


def load_weights(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, shards: Shards = ALONE) -> Weights:
    """Read every tensor's slice into its place, rounded to the checkpoint's run dtype and stored as `dtype`.

    All files' headers are checked before anything is allocated. model.format=random: the same random weights at every
    start, made on the device; the same slice on every rank.
    """
    config = shards.slice_config(checkpoint.config)
    if checkpoint.format is ModelFormat.random:
        weights = empty_weights(config, dtype, device)
        _draw(weights)
        return weights
    source = open_tensors(checkpoint)
    weights = empty_weights(config, dtype, device)
    staging = open_staging(device)
    places = _places(checkpoint, weights, shards, staging)
    elements = sum(math.prod(place.shape) for place in places.values())
    with LoadProgress("loading weights", checkpoint.num_bytes(), elements) as progress:
        fill(source, places, progress)
        staging.finish()
    return weights


def open_tensors(checkpoint: Checkpoint) -> HubNames:
    """The checkpoint's tensors under the hub's names; BatchmixError where a file or a tensor is not as it should be."""
    files = TensorFiles(checkpoint.files)
    if checkpoint.format is ModelFormat.hf:
        check_index(checkpoint.folder, files)
    layouts = [mistral, stacked] if checkpoint.format is ModelFormat.mistral else [hub, fused]
    layout = choose_layout(files, [layout(checkpoint.config) for layout in layouts], checkpoint.folder)
    return HubNames(files, layout, checkpoint.config)


def _places(checkpoint: Checkpoint, weights: Weights, shards: Shards, staging: Staging) -> dict[str, Place]:
    shapes = hub_shapes(checkpoint.config)
    targets = _hub_targets(shards.slice_config(checkpoint.config), weights)
    return {
        name: DensePlace(shapes[name], target, checkpoint.dtype, shards, staging) for name, target in targets.items()
    }


def _hub_targets(config: MixtralConfig, weights: Weights) -> dict[str, Tensor]:
    """Where in the weights each of the hub's tensors lies."""
    targets = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.tie_word_embeddings:
        targets["lm_head.weight"] = weights.lm_head
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for i, layer in enumerate(weights.layers):
        prefix = f"model.layers.{i}"
        wq, wk, wv = torch.split(layer.wqkv, [queries, keys, keys])
        targets |= {
            f"{prefix}.self_attn.q_proj.weight": wq,
            f"{prefix}.self_attn.k_proj.weight": wk,
            f"{prefix}.self_attn.v_proj.weight": wv,
            f"{prefix}.self_attn.o_proj.weight": layer.wo,
            f"{prefix}.input_layernorm.weight": layer.attention_norm,
            f"{prefix}.post_attention_layernorm.weight": layer.ffn_norm,
            f"{prefix}.block_sparse_moe.gate.weight": layer.router,
        }
        for e, (w13, w2) in enumerate(zip(layer.w13, layer.w2, strict=True)):
            w1, w3 = w13.chunk(2)
            targets |= {expert_name(i, e, "w1"): w1, expert_name(i, e, "w3"): w3, expert_name(i, e, "w2"): w2}
    return targets


def _draw(weights: Weights) -> None:
    """Norms of 1, all else normal with the standard deviation of transformers' initializer_range."""
    source = torch.Generator(weights.embedding.device).manual_seed(0)
    tables = [weights.embedding, weights.norm, weights.lm_head]
    for tensor in [*tables, *(tensor for layer in weights.layers for tensor in vars(layer).values())]:
        if tensor.ndim == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02, generator=source)
