"""How checkpoints name and arrange a Mixtral's tensors, each told by what it makes of the hub's.

The hub's own arrangement (`hub_shapes`) is the common tongue: one w1, w2, w3 per expert, queries and keys with rotary
halves. Every other layout says which of the hub's tensors each of its own holds, and in which form; that reads it
(`HubNames`) and writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from batchmix.checkpoints.sources import TensorFiles, in_line, release_pages
from batchmix.errors import BatchmixError
from batchmix.json_file import shown
from batchmix.models.mixtral_config import MixtralConfig

_log = logging.getLogger(__name__)
Shape = tuple[int, ...]
FLOATS = ("BF16", "F16", "F32", "F64")


class Form(Enum):
    """How a layout stores one of the hub's tensors."""

    same = "same"
    interleaved = "interleaved"  # rotary pairs side by side instead of in halves
    transposed = "transposed"


@dataclass(frozen=True)
class Stored:
    """One tensor of a layout: the hub's tensors that it holds, in the order of its bytes."""

    shape: Shape
    parts: tuple[str, ...]
    form: Form = Form.same


Layout = Mapping[str, Stored]  # by the layout's own names

_EXPERTS = ".experts."
_FUSED_NAMES = [("block_sparse_moe.", "mlp.")]
_MISTRAL_NAMES = [
    ("model.embed_tokens.", "tok_embeddings."),
    ("lm_head.", "output."),
    ("model.", ""),
    ("self_attn.q_proj.", "attention.wq."),
    ("self_attn.k_proj.", "attention.wk."),
    ("self_attn.v_proj.", "attention.wv."),
    ("self_attn.o_proj.", "attention.wo."),
    ("input_layernorm.", "attention_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
]


def hub_shapes(config: MixtralConfig) -> dict[str, Shape]:
    """Every tensor on the hub, in the order of the network."""
    hidden, width = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.block_sparse_moe.gate.weight": (config.num_local_experts, hidden),
        }
        for e in range(config.num_local_experts):
            shapes |= {
                expert_name(i, e, "w1"): (width, hidden),
                expert_name(i, e, "w3"): (width, hidden),
                expert_name(i, e, "w2"): (hidden, width),
            }
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def expert_name(layer: int, expert: int, matrix: str) -> str:
    """The hub's name of an expert's w1 (gate), w3 (up) or w2 (down)."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"


def hub(config: MixtralConfig) -> Layout:
    """The names on the hub: one w1, w2, w3 per expert."""
    return {name: Stored(shape, (name,)) for name, shape in hub_shapes(config).items()}


def fused(config: MixtralConfig) -> Layout:
    """The names of transformers 5 in memory: all experts in one tensor, gate and up of each one after the other."""
    experts, width, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
    layout = _without_experts(config, _FUSED_NAMES, rotary=Form.same)
    for i in range(config.num_hidden_layers):
        gate_up = tuple(expert_name(i, e, matrix) for e in range(experts) for matrix in ("w1", "w3"))
        down = tuple(expert_name(i, e, "w2") for e in range(experts))
        layout[f"model.layers.{i}.mlp.experts.gate_up_proj"] = Stored((experts, 2 * width, hidden), gate_up)
        layout[f"model.layers.{i}.mlp.experts.down_proj"] = Stored((experts, hidden, width), down)
    return _in_order(layout, config)


def mistral(config: MixtralConfig) -> Layout:
    """The names of mistral_inference."""
    names = [*_MISTRAL_NAMES, ("block_sparse_moe.", "feed_forward.")]
    layout = _without_experts(config, names, rotary=Form.interleaved)
    experts = {name: shape for name, shape in hub_shapes(config).items() if _EXPERTS in name}
    layout |= {_rename(name, names): Stored(shape, (name,)) for name, shape in experts.items()}
    return _in_order(layout, config)


def stacked(config: MixtralConfig) -> Layout:
    """The names in consolidated.00.pt to .07.pt, which lie beside 8x7B's safetensors on the hub.

    A layer has one matrix for the w1 of all experts, one below the other, and so for w3, and for w2 transposed:
    [E F, D] each (transformers' convert_mixtral_weights_to_hf.py reads these files).
    """
    experts, width, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
    layout = _without_experts(config, _MISTRAL_NAMES, rotary=Form.interleaved)
    for i in range(config.num_hidden_layers):
        for matrix, form in (("w1", Form.same), ("w2", Form.transposed), ("w3", Form.same)):
            parts = tuple(expert_name(i, e, matrix) for e in range(experts))
            layout[f"layers.{i}.block_sparse_moe.{matrix}"] = Stored((experts * width, hidden), parts, form)
    return _in_order(layout, config)


def select_layout(files: TensorFiles, layouts: list[Layout], folder: Path) -> Layout:
    """The layout whose names are there, with every tensor there, of its shape, and in floating point.

    BatchmixError names what is not; where some are missing, of the closest layout.
    """
    shapes = files.shapes()
    layout = max(layouts, key=lambda layout: len(shapes.keys() & layout.keys()))
    missing = [name for name in layout if name not in shapes]
    if missing:
        more = f", and {len(missing) - 1} more" if missing[1:] else ""
        raise BatchmixError(f"{folder}: tensor {missing[0]} is missing{more}")
    for name, stored in layout.items():
        if shapes[name] != stored.shape:
            raise BatchmixError(
                f"{files.path(name)}: tensor {name} is {shown(list(shapes[name]))}, not {list(stored.shape)}"
            )
        if files.dtype(name) not in FLOATS:
            raise BatchmixError(
                f"{files.path(name)}: tensor {name} is of type {files.dtype(name)}, not one of {', '.join(FLOATS)}"
            )
    return layout


def check_rest(files: TensorFiles, layout: Layout, config: MixtralConfig) -> None:
    """Warn of tensors that no part of the network is made of.

    BatchmixError for an output layer that says something else than the embeddings that config.json ties it to.
    """
    rest = [name for name in files.shapes() if name not in layout and not name.endswith("rotary_emb.inv_freq")]
    if config.tie_word_embeddings and "lm_head.weight" in rest:
        rest.remove("lm_head.weight")
        if not torch.equal(files.read("lm_head.weight"), files.read("model.embed_tokens.weight")):
            raise BatchmixError(
                f"{files.path('lm_head.weight')}: tensor lm_head.weight differs from model.embed_tokens.weight, but"
                " config.json says tie_word_embeddings=true; set it to false"
            )
    if rest:
        more = f" and {len(rest) - 1} more tensors are" if rest[1:] else " is"
        _log.warning("%s: tensor %s%s not used: a Mixtral of this configuration has none of that name",
                     files.path(rest[0]), in_line(rest[0]), more)  # fmt: skip


class HubNames:
    """A checkpoint of any layout as the hub would name and shape it: a `TensorSource`."""

    def __init__(self, files: TensorFiles, layout: Layout, config: MixtralConfig) -> None:
        self._files = files
        self._shapes = hub_shapes(config)
        self._head_dim = config.head_dim
        order = [name for name in files.shapes() if name in layout]
        # hub name -> the layout's own, and which of its parts
        self._where = {part: (name, k) for name in order for k, part in enumerate(layout[name].parts)}
        self._layout = layout

    def shapes(self) -> Mapping[str, Shape]:
        return {name: self._shapes[name] for name in self._where}

    def read(self, name: str) -> Tensor:
        own, _ = self._where[name]
        return to_hub(self._part(name), self._layout[own].form, self._head_dim)

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is stored."""
        return self._files.read(self._where[name][0]).dtype

    def release(self, name: str) -> None:
        stored = self._files.read(self._where[name][0])
        release_pages(self._part(name) if stored.is_contiguous() else stored)

    def _part(self, name: str) -> Tensor:
        own, k = self._where[name]
        stored = self._layout[own]
        shape = self._shapes[name][::-1] if stored.form is Form.transposed else self._shapes[name]
        return self._files.read(own).reshape(len(stored.parts), *shape)[k]  # a view, but of a .pth file's odd strides


def to_hub(tensor: Tensor, form: Form, head_dim: int) -> Tensor:
    """One of the hub's tensors from the form in which a layout stores it.

    Rotary pairs: row 2i of a head becomes row i, row 2i + 1 becomes row head_dim / 2 + i, as transformers'
    convert_mixtral_weights_to_hf.py does.
    """
    if form is Form.transposed:
        return tensor.T
    if form is Form.interleaved:
        return tensor.reshape(-1, head_dim // 2, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def from_hub(tensor: Tensor, form: Form, head_dim: int) -> Tensor:
    """The inverse of `to_hub`."""
    if form is Form.transposed:
        return tensor.T
    if form is Form.interleaved:
        return tensor.reshape(-1, 2, head_dim // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _without_experts(config: MixtralConfig, names: list[tuple[str, str]], rotary: Form) -> dict[str, Stored]:
    layout = {}
    for name, shape in hub_shapes(config).items():
        if _EXPERTS not in name:
            form = rotary if name.endswith((".q_proj.weight", ".k_proj.weight")) else Form.same
            layout[_rename(name, names)] = Stored(shape, (name,), form)
    return layout


def _rename(name: str, names: list[tuple[str, str]]) -> str:
    for old, new in names:
        name = name.replace(old, new)
    return name


def _in_order(layout: dict[str, Stored], config: MixtralConfig) -> Layout:
    position = {name: k for k, name in enumerate(hub_shapes(config))}
    return dict(sorted(layout.items(), key=lambda item: position[item[1].parts[0]]))
