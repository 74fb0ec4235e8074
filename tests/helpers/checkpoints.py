"""Small random Mixtral checkpoints, in every layout that people keep them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_mixtral(seed: int = 0, **changes: Any) -> MixtralForCausalLM:
    """transformers' model in float32, with weights wide enough that greedy choices are no near-ties."""
    torch.manual_seed(seed)
    model = MixtralForCausalLM(MixtralConfig(**{**SHAPE, **changes})).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def save_hub(model: MixtralForCausalLM, folder: Path) -> Path:
    """As on the hub: config.json, and w1, w2, w3 of each expert."""
    model.save_pretrained(folder)
    return folder


def save_fused(model: MixtralForCausalLM, folder: Path) -> Path:
    """As transformers 5 names them in memory: gate_up_proj and down_proj of all experts together."""
    folder.mkdir(exist_ok=True)
    config = model.config.to_dict() | {"architectures": ["MixtralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def save_mistral(model: MixtralForCausalLM, folder: Path, pth: bool = False) -> Path:
    """As mistral_inference reads them: params.json and consolidated weights, rotary pairs side by side."""
    folder.mkdir(exist_ok=True)
    config = model.config
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": 10000.0,
        "max_seq_len": config.max_position_embeddings,
        "moe": {"num_experts_per_tok": config.num_experts_per_tok, "num_experts": config.num_local_experts},
    }
    (folder / "params.json").write_text(json.dumps(params))
    state = model.state_dict()
    renamed = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}", f"layers.{i}"
        for name in ("q", "k", "v", "o"):
            weight = state[f"{old}.self_attn.{name}_proj.weight"]
            renamed[f"{new}.attention.w{name}.weight"] = (
                side_by_side(weight, config.head_dim) if name in "qk" else weight
            )
        renamed[f"{new}.attention_norm.weight"] = state[f"{old}.input_layernorm.weight"]
        renamed[f"{new}.ffn_norm.weight"] = state[f"{old}.post_attention_layernorm.weight"]
        renamed[f"{new}.feed_forward.gate.weight"] = state[f"{old}.mlp.gate.weight"]
        gate_up, down = state[f"{old}.mlp.experts.gate_up_proj"], state[f"{old}.mlp.experts.down_proj"]
        for expert in range(config.num_local_experts):
            w1, w3 = gate_up[expert].chunk(2)
            for name, weight in (("w1", w1), ("w2", down[expert]), ("w3", w3)):
                renamed[f"{new}.feed_forward.experts.{expert}.{name}.weight"] = weight
    renamed = {name: weight.clone().contiguous() for name, weight in renamed.items()}
    if pth:
        torch.save(renamed, folder / "consolidated.00.pth")
    else:
        save_file(renamed, folder / "consolidated.safetensors")
    return folder


def save_stacked(model: MixtralForCausalLM, folder: Path) -> Path:
    """As 8x7B's consolidated.00.pt to .07.pt on the hub: config.json, and all experts of a layer in one matrix."""
    state = torch.load(save_mistral(model, folder, pth=True) / "consolidated.00.pth", weights_only=True)
    (folder / "consolidated.00.pth").unlink()
    (folder / "params.json").unlink()
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    experts = model.config.num_local_experts
    for i in range(model.config.num_hidden_layers):
        state[f"layers.{i}.block_sparse_moe.gate.weight"] = state.pop(f"layers.{i}.feed_forward.gate.weight")
        for matrix in ("w1", "w2", "w3"):
            parts = [state.pop(f"layers.{i}.feed_forward.experts.{e}.{matrix}.weight") for e in range(experts)]
            parts = [part.T for part in parts] if matrix == "w2" else parts
            state[f"layers.{i}.block_sparse_moe.{matrix}"] = torch.cat(parts)
    for number in range(8):
        names = sorted(state)[number::8]
        torch.save({name: state[name] for name in names}, folder / f"consolidated.{number:02}.pt")
    return folder


def side_by_side(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A projection's rows from rotary halves (the hub's) to interleaved rotary pairs (Mistral's)."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)
