"""Mixtral's weights: how they lie in memory, and how each checkpoint layout's names map onto them.

Shapes: V vocabulary, D hidden, F expert hidden, E experts, H heads, G kv heads, C head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from batchmix.config import ModelFormat
from batchmix.errors import BatchmixError
from batchmix.model.checkpoint import Checkpoint
from batchmix.model.config import MixtralConfig
from batchmix.model.offload import Offload
from batchmix.model.shards import ALONE, Shards


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


def empty_weights(
    config: MixtralConfig, dtype: torch.dtype, device: torch.device, offload: Offload | None = None
) -> Weights:
    """Weights of the right shapes, not initialised: on the device, but for the experts that `offload` keeps elsewhere."""

    def on_device(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    allocate = on_device if offload is None else offload.link.empty
    places = [on_device if offload is None else offload.experts(layer) for layer in range(config.num_hidden_layers)]

    def empty(*shape: int) -> Tensor:
        return allocate(shape, dtype)

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
                w13=place((experts, 2 * width, hidden), dtype),
                w2=place((experts, hidden, width), dtype),
            )
            for place in places
        ],
        norm=empty(hidden),
        lm_head=embedding if config.tie_word_embeddings else empty(config.vocab_size, hidden),
    )


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    shards: Shards = ALONE,
    offload: Offload | None = None,
) -> Weights:
    """Read every tensor's slice into its place, rounded to the checkpoint's run dtype and stored as `dtype`.

    model.format=random: the same random weights at every start, made on the device; the same slice on every rank.
    """
    config = shards.slice_config(checkpoint.config)
    weights = empty_weights(config, dtype, device, offload)
    if checkpoint.format is ModelFormat.random:
        _draw(weights)
        return weights
    whole = empty_weights(checkpoint.config, dtype, torch.device("meta"))  # shapes
    layouts = [_mistral_places] if checkpoint.format is ModelFormat.mistral else [_hub_places, _fused_places]
    names = {name for name, _ in _tensors(checkpoint.files, names_only=True)}
    # The layout whose names are there; where some are missing, the closest, so that the message names what lacks.
    layout = max(layouts, key=lambda layout: len(names & layout(checkpoint.config, whole).keys()))
    places, shapes = layout(config, weights), layout(checkpoint.config, whole)
    missing = sorted(places.keys() - names)
    if missing:
        raise BatchmixError(f"{checkpoint.folder}: tensor {missing[0]} is missing"
                            + (f", and {len(missing) - 1} more" if missing[1:] else ""))  # fmt: skip
    for name, tensor in _tensors(checkpoint.files):
        place = places.get(name)
        if place is None:
            continue  # rotary inv_freq and the like, which are computed; a tied checkpoint's second copy
        shape = shapes[name].shape
        if tensor.shape != shape:
            raise BatchmixError(f"{checkpoint.folder}: tensor {name} is {list(tensor.shape)}, not {list(shape)}")
        if checkpoint.format is ModelFormat.mistral and name.endswith((".wq.weight", ".wk.weight")):
            tensor = _to_half_split(tensor, checkpoint.config.head_dim)
        halves = 2 if name.endswith(".gate_up_proj") else 1  # [E, 2F, D]: gate, then up
        for part, its_place in zip(
            tensor.chunk(halves, tensor.ndim - 2), place.chunk(halves, tensor.ndim - 2), strict=True
        ):
            its_place.copy_(shards.cut(part, its_place.shape).to(checkpoint.dtype))
    return weights


def _draw(weights: Weights) -> None:
    """Norms of 1, all else normal with the standard deviation of transformers' initializer_range."""
    source = torch.Generator(weights.embedding.device).manual_seed(0)
    tables = [weights.embedding, weights.norm, weights.lm_head]
    for tensor in [*tables, *(tensor for layer in weights.layers for tensor in vars(layer).values())]:
        if tensor.ndim == 1:
            tensor.fill_(1.0)
        else:  # on the device, where it is the same wherever the tensor lies
            place = tensor if tensor.device == source.device else torch.empty_like(tensor, device=source.device)
            tensor.copy_(place.normal_(0.0, 0.02, generator=source))


def _tensors(files: tuple[Path, ...], names_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        if path.suffix == ".pth":
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            yield from state.items()
            continue
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (a safe_open handle is no dict)
                    yield name, torch.empty(0) if names_only else file.get_tensor(name)
        except SafetensorError as error:
            raise BatchmixError(f"{path}: is damaged or no safetensors file ({error})") from None


def _to_half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder a projection's rows from interleaved rotary pairs (Mistral's own) to half-split ones (ours, the hub's).

    Row 2i of a head becomes row i, row 2i+1 becomes row head_dim/2 + i: the permutation that transformers'
    convert_mixtral_weights_to_hf.py applies.
    """
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _attention_places(config: MixtralConfig, layer: LayerWeights, q: str, k: str, v: str) -> dict[str, Tensor]:
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    wq, wk, wv = torch.split(layer.wqkv, [queries, keys, keys])
    return {q: wq, k: wk, v: wv}


def _expert_places(layer: LayerWeights, prefix: str) -> dict[str, Tensor]:
    places: dict[str, Tensor] = {}
    for e, (w13, w2) in enumerate(zip(layer.w13, layer.w2, strict=True)):
        w1, w3 = w13.chunk(2)
        places |= {f"{prefix}.{e}.w1.weight": w1, f"{prefix}.{e}.w3.weight": w3, f"{prefix}.{e}.w2.weight": w2}
    return places


def _hf_places(config: MixtralConfig, weights: Weights, experts_key: str) -> dict[str, Tensor]:
    places = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = weights.lm_head
    for i, layer in enumerate(weights.layers):
        prefix = f"model.layers.{i}"
        attention = f"{prefix}.self_attn"
        places |= _attention_places(
            config, layer, f"{attention}.q_proj.weight", f"{attention}.k_proj.weight", f"{attention}.v_proj.weight"
        )
        places |= {
            f"{attention}.o_proj.weight": layer.wo,
            f"{prefix}.input_layernorm.weight": layer.attention_norm,
            f"{prefix}.post_attention_layernorm.weight": layer.ffn_norm,
            f"{prefix}.{experts_key}.gate.weight": layer.router,
        }
    return places


def _hub_places(config: MixtralConfig, weights: Weights) -> dict[str, Tensor]:
    """The names on the hub: one w1, w2, w3 per expert."""
    places = _hf_places(config, weights, "block_sparse_moe")
    for i, layer in enumerate(weights.layers):
        places |= _expert_places(layer, f"model.layers.{i}.block_sparse_moe.experts")
    return places


def _fused_places(config: MixtralConfig, weights: Weights) -> dict[str, Tensor]:
    """The names of transformers 5 in memory: all experts in one tensor."""
    places = _hf_places(config, weights, "mlp")
    for i, layer in enumerate(weights.layers):
        experts = f"model.layers.{i}.mlp.experts"
        places |= {f"{experts}.gate_up_proj": layer.w13, f"{experts}.down_proj": layer.w2}
    return places


def _mistral_places(config: MixtralConfig, weights: Weights) -> dict[str, Tensor]:
    """The names of mistral_inference."""
    places = {"tok_embeddings.weight": weights.embedding, "norm.weight": weights.norm, "output.weight": weights.lm_head}
    for i, layer in enumerate(weights.layers):
        prefix = f"layers.{i}"
        attention = f"{prefix}.attention"
        places |= _attention_places(
            config, layer, f"{attention}.wq.weight", f"{attention}.wk.weight", f"{attention}.wv.weight"
        )
        places |= {
            f"{attention}.wo.weight": layer.wo,
            f"{prefix}.attention_norm.weight": layer.attention_norm,
            f"{prefix}.ffn_norm.weight": layer.ffn_norm,
            f"{prefix}.feed_forward.gate.weight": layer.router,
        }
        places |= _expert_places(layer, f"{prefix}.feed_forward.experts")
    return places
