"""Mixtral over a Mistral folder as mistral_inference computes it: rotary pairs side by side, as complex numbers.

Written from its description and apart from batchmix's own code, in float32, one row at a time.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def mistral_logits(folder: Path, token_ids: list[int]) -> Tensor:
    """Logits [T, V] of every position."""
    params = json.loads((folder / "params.json").read_text())
    state = {name: tensor.float() for name, tensor in load_file(folder / "consolidated.safetensors").items()}
    heads, kv_heads, width, eps = params["n_heads"], params["n_kv_heads"], params["head_dim"], params["norm_eps"]
    count = len(token_ids)
    frequencies = 1.0 / params["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(count).float(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # [T, 1, C/2]
    later = torch.full((count, count), float("-inf")).triu(1)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def turned(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)

    x = state["tok_embeddings.weight"][token_ids]
    for i in range(params["n_layers"]):
        layer = {name.removeprefix(f"layers.{i}."): t for name, t in state.items() if name.startswith(f"layers.{i}.")}
        h = norm(x, layer["attention_norm.weight"])
        q = turned((h @ layer["attention.wq.weight"].T).view(count, heads, width))
        k = turned((h @ layer["attention.wk.weight"].T).view(count, kv_heads, width))
        v = (h @ layer["attention.wv.weight"].T).view(count, kv_heads, width)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("thc,shc->hts", q, k) / width**0.5 + later
        attended = torch.einsum("hts,shc->thc", scores.softmax(-1), v).flatten(1)
        x = x + attended @ layer["attention.wo.weight"].T
        h = norm(x, layer["ffn_norm.weight"])
        weights, chosen = torch.topk(h @ layer["feed_forward.gate.weight"].T, params["moe"]["num_experts_per_tok"])
        weights = weights.softmax(-1)
        for token in range(count):
            for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
                w1, w2, w3 = (layer[f"feed_forward.experts.{expert}.w{n}.weight"] for n in (1, 2, 3))
                gated = torch.nn.functional.silu(w1 @ h[token]) * (w3 @ h[token])
                x[token] = x[token] + weight * (w2 @ gated)
    return norm(x, state["norm.weight"]) @ state["output.weight"].T
