"""A checkpoint's tensors into Mixtral's weights: where in them each goes.

Shapes: V vocabulary, D hidden, F expert hidden, E experts, H heads, G kv heads, C head dim.
"""

from __future__ import annotations

import logging
import math

import torch

from batchmix.checkpoints.checkpoint import Checkpoint, check_index
from batchmix.checkpoints.config import ModelFormat
from batchmix.checkpoints.layouts import (
    HubNames,
    check_rest,
    expert_name,
    fused,
    hub,
    hub_shapes,
    mistral,
    select_layout,
    stacked,
)
from batchmix.checkpoints.prequantized import PackedTensors, Packing
from batchmix.checkpoints.quantized_target import QuantizedTarget
from batchmix.checkpoints.reading import fill
from batchmix.checkpoints.sources import TensorFiles
from batchmix.checkpoints.staging import Direct, Staging, open_staging
from batchmix.checkpoints.targets import DenseTarget, TensorTarget
from batchmix.dtypes import dtype_name
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.models.quantized import Quantized, Weight, quantize
from batchmix.models.tensor_parallel import SINGLE_RANK, TensorParallel
from batchmix.models.weights import Allocation, Weights, empty_weights
from batchmix.observability.loading import LoadProgress

_log = logging.getLogger(__name__)


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    tp: TensorParallel = SINGLE_RANK,
    allocation: Allocation | None = None,
) -> Weights:
    """Read every tensor's slice into its place, rounded to the checkpoint's run dtype and stored as `dtype`.

    All files' headers are checked before anything is allocated. model.format=random: the same random weights at every
    start, made on the device; the same slice on every rank.
    """
    config = tp.slice_config(checkpoint.config)
    if checkpoint.format is ModelFormat.random:
        weights = empty_weights(config, dtype, device, checkpoint.quantization, allocation)
        _draw(weights)
        return weights
    files = TensorFiles(checkpoint.files, hashed=tp.rank == 0)
    source = open_tensors(checkpoint, files)
    weights = empty_weights(config, dtype, device, checkpoint.quantization, allocation)
    staging = open_staging(device)
    places = _places(checkpoint, weights, tp, staging, device)
    elements = sum(math.prod(place.shape) for place in places.values())
    with LoadProgress("loading weights", checkpoint.num_bytes(), elements) as progress:
        fill(source, places, progress)
        staging.finish()
    weights.fingerprint = files.fingerprint()
    return weights


def open_tensors(checkpoint: Checkpoint, files: TensorFiles) -> HubNames | PackedTensors:
    """The checkpoint's tensors, in `files`, under the hub's names; BatchmixError where one is not as it should be."""
    if checkpoint.format is ModelFormat.hf:
        check_index(checkpoint.folder, files)
    if checkpoint.packing is not None:
        return _open_packed(files, checkpoint, checkpoint.packing)
    layouts = [mistral, stacked] if checkpoint.format is ModelFormat.mistral else [hub, fused]
    layout = select_layout(files, [layout(checkpoint.config) for layout in layouts], checkpoint.folder)
    check_rest(files, layout, checkpoint.config)
    return HubNames(files, layout, checkpoint.config)


def _open_packed(files: TensorFiles, checkpoint: Checkpoint, packing: Packing) -> PackedTensors:
    """A checkpoint that is quantised already. Its experts must be where its codes are kept as they are."""
    source = PackedTensors(files, packing, checkpoint.config, checkpoint.folder)
    if checkpoint.quantization is packing.runs is not None:
        for name in source.shapes():
            if ".experts." in name:
                source.require(name)
    elif checkpoint.quantization is None:
        _log.info(
            "%s: no kernel here runs %s, so the weights are widened to %s; model.quantization=int4, int8 or fp8 would"
            " quantise them again", checkpoint.folder.name, packing.name, dtype_name(checkpoint.dtype),
        )  # fmt: skip
    return source


def _places(
    checkpoint: Checkpoint, weights: Weights, tp: TensorParallel, staging: Staging, device: torch.device
) -> dict[str, TensorTarget]:
    shapes = hub_shapes(checkpoint.config)
    targets = _hub_targets(tp.slice_config(checkpoint.config), weights)
    dtype = checkpoint.dtype
    return {
        name: QuantizedTarget(shapes[name], target, dtype, tp, device)
        if isinstance(target, Quantized)
        else DenseTarget(shapes[name], target, dtype, tp, staging if target.device.type == device.type else Direct())
        for name, target in targets.items()
    }


def _hub_targets(config: MixtralConfig, weights: Weights) -> dict[str, Weight]:
    """Where in the weights each of the hub's tensors lies."""
    targets: dict[str, Weight] = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
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
            w1, w3 = w13.chunk(2, 0)
            targets |= {expert_name(i, e, "w1"): w1, expert_name(i, e, "w3"): w3, expert_name(i, e, "w2"): w2}
    return targets


def _draw(weights: Weights) -> None:
    """Norms of 1, all else normal with the standard deviation of transformers' initializer_range.

    Drawn on the device, so that they are the same wherever they lie.
    """
    source = torch.Generator(weights.embedding.device).manual_seed(0)
    dtype, device = weights.embedding.dtype, weights.embedding.device
    tables = [weights.embedding, weights.norm, weights.lm_head]
    for weight in [*tables, *(weight for layer in weights.layers for weight in vars(layer).values())]:
        if isinstance(weight, Quantized):
            for expert in weight:
                values = torch.empty(expert.shape, dtype=dtype, device=device)
                expert.copy_(quantize(values.normal_(0.0, 0.02, generator=source), weight.format))
        elif weight.ndim == 1:
            weight.fill_(1.0)
        else:
            place = weight if weight.device == device else torch.empty_like(weight, device=device)
            weight.copy_(place.normal_(0.0, 0.02, generator=source))
