"""The shape of a Mixtral, read from either kind of configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchmix.errors import BatchmixError


@dataclass(frozen=True)
class MixtralConfig:
    """Names as in transformers' MixtralConfig."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> MixtralConfig:
        """From a hub folder's config.json; BatchmixError for another architecture or a feature that we lack."""
        kind = config.get("model_type")
        if kind != "mixtral":
            raise BatchmixError(f"config.json: model_type is {kind!r}; batchmix runs mixtral only")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise BatchmixError(f"config.json: rope type {rope.get('rope_type', rope.get('type'))!r} is not supported")
        positions = config.get("max_position_embeddings", 32768)
        window = config.get("sliding_window")
        if window is not None and window < positions:
            raise BatchmixError(
                f"config.json: sliding_window={window} is not supported (Mixtral attends to all tokens)"
            )
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim") or hidden // heads,
            num_local_experts=config["num_local_experts"],
            num_experts_per_tok=config.get("num_experts_per_tok", 2),
            max_position_embeddings=positions,
            rms_norm_eps=config.get("rms_norm_eps", 1e-5),
            rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 1e6),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )

    @classmethod
    def from_mistral(cls, params: Mapping[str, Any]) -> MixtralConfig:
        """From a Mistral folder's params.json, as mistral_inference reads it."""
        moe = params.get("moe")
        if not moe:
            raise BatchmixError("params.json: has no `moe`, so it is no Mixtral (batchmix runs mixtral only)")
        if params.get("sliding_window"):
            raise BatchmixError(f"params.json: sliding_window={params['sliding_window']} is not supported")
        return cls(
            vocab_size=params["vocab_size"],
            hidden_size=params["dim"],
            intermediate_size=params["hidden_dim"],
            num_hidden_layers=params["n_layers"],
            num_attention_heads=params["n_heads"],
            num_key_value_heads=params["n_kv_heads"],
            head_dim=params["head_dim"],
            num_local_experts=moe["num_experts"],
            num_experts_per_tok=moe["num_experts_per_tok"],
            max_position_embeddings=params.get("max_seq_len", 32768),
            rms_norm_eps=params["norm_eps"],
            rope_theta=float(params.get("rope_theta", 1e6)),
        )
