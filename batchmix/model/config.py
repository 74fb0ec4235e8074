"""The shape of a Mixtral, read from either kind of configuration file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
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
        if not isinstance(rope, dict):
            raise BatchmixError(f"config.json: rope_parameters is {rope!r}, no object")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise BatchmixError(f"config.json: rope type {rope.get('rope_type', rope.get('type'))!r} is not supported")
        number = partial(_number, config, "config.json")
        positions = number("max_position_embeddings", 32768)
        window = config.get("sliding_window")
        if window is not None and not (isinstance(window, int) and window >= positions):
            raise BatchmixError(
                f"config.json: sliding_window={window} is not supported (Mixtral attends to all tokens)"
            )
        heads, hidden = number("num_attention_heads"), number("hidden_size")
        return cls(
            vocab_size=number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size"),
            num_hidden_layers=number("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=number("num_key_value_heads", heads),
            head_dim=number("head_dim", hidden // heads),
            num_local_experts=number("num_local_experts"),
            num_experts_per_tok=number("num_experts_per_tok", 2),
            max_position_embeddings=positions,
            rms_norm_eps=_real(config, "config.json", "rms_norm_eps", 1e-5),
            rope_theta=_real(
                {"rope_theta": config.get("rope_theta") or rope.get("rope_theta")}, "config.json", "rope_theta", 1e6
            ),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    @classmethod
    def from_mistral(cls, params: Mapping[str, Any]) -> MixtralConfig:
        """From a Mistral folder's params.json, as mistral_inference reads it."""
        moe = params.get("moe")
        if not isinstance(moe, dict):
            raise BatchmixError("params.json: has no `moe`, so it is no Mixtral (batchmix runs mixtral only)")
        if params.get("sliding_window"):
            raise BatchmixError(f"params.json: sliding_window={params['sliding_window']} is not supported")
        number = partial(_number, params, "params.json")
        return cls(
            vocab_size=number("vocab_size"),
            hidden_size=number("dim"),
            intermediate_size=number("hidden_dim"),
            num_hidden_layers=number("n_layers"),
            num_attention_heads=number("n_heads"),
            num_key_value_heads=number("n_kv_heads"),
            head_dim=number("head_dim"),
            num_local_experts=_number(moe, "params.json: moe", "num_experts"),
            num_experts_per_tok=_number(moe, "params.json: moe", "num_experts_per_tok"),
            max_position_embeddings=number("max_seq_len", 32768),
            rms_norm_eps=_real(params, "params.json", "norm_eps", None),
            rope_theta=_real(params, "params.json", "rope_theta", 1e6),
        )

    def to_hf(self) -> dict[str, Any]:
        """The keys of config.json."""
        return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **asdict(self)}

    def to_mistral(self) -> dict[str, Any]:
        """params.json. It has no place for tied embeddings: the output layer must be written out."""
        return {
            "dim": self.hidden_size,
            "n_layers": self.num_hidden_layers,
            "head_dim": self.head_dim,
            "hidden_dim": self.intermediate_size,
            "n_heads": self.num_attention_heads,
            "n_kv_heads": self.num_key_value_heads,
            "norm_eps": self.rms_norm_eps,
            "vocab_size": self.vocab_size,
            "rope_theta": self.rope_theta,
            "max_seq_len": self.max_position_embeddings,
            "moe": {"num_experts_per_tok": self.num_experts_per_tok, "num_experts": self.num_local_experts},
        }


def _number(values: Mapping[str, Any], where: str, key: str, default: int | None = None) -> int:
    """values[key], or the default where that is missing or null; BatchmixError where it is no size."""
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BatchmixError(f"{where}: {key} is {'missing' if value is None else repr(value)}; it must be 1 or more")
    return value


def _real(values: Mapping[str, Any], where: str, key: str, default: float | None) -> float:
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise BatchmixError(f"{where}: {key} is {'missing' if value is None else repr(value)}; it must be above 0")
    return float(value)
