"""The shape of a Mixtral, read from either kind of configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from batchmix.errors import BatchmixError
from batchmix.json_file import shown
from batchmix.models.config_keys import CONFIG, MOE, PARAMS, ROPE, Keys

# The largest sizes that are read: some times those of the largest Mixtral, and small enough that a file that lies about
# them costs no memory before the weights' headers are compared with it.
_LIMITS = {
    "vocab_size": 2**21, "hidden_size": 2**17, "intermediate_size": 2**17, "num_hidden_layers": 256,
    "num_attention_heads": 1024, "num_key_value_heads": 1024, "head_dim": 1024, "num_local_experts": 512,
    "num_experts_per_tok": 512, "max_position_embeddings": 2**20,
}  # fmt: skip
_NAMES = {  # of params.json
    "dim": "hidden_size", "hidden_dim": "intermediate_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "num_experts": "num_local_experts",
    "max_seq_len": "max_position_embeddings",
}  # fmt: skip


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
            raise BatchmixError(f"config.json: model_type is {shown(kind)}; batchmix runs mixtral only")
        CONFIG.check(config)
        rope = _rope(config)
        number = partial(_number, config, "config.json")
        heads, hidden = number("num_attention_heads"), number("hidden_size")
        experts = number("num_local_experts", config.get("num_experts"))  # transformers knows both names
        if config.get("num_experts") not in (None, experts):
            raise BatchmixError(
                f"config.json: num_experts={shown(config['num_experts'])}, but num_local_experts={experts}"
            )
        return cls(
            vocab_size=number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size"),
            num_hidden_layers=number("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=number("num_key_value_heads", heads if "num_key_value_heads" in config else 8),
            head_dim=number("head_dim", hidden // heads),
            num_local_experts=experts,
            num_experts_per_tok=number("num_experts_per_tok", 2),
            max_position_embeddings=number("max_position_embeddings", 131072),
            rms_norm_eps=_real(config, "config.json", "rms_norm_eps", 1e-5),
            rope_theta=_real(rope, "config.json", "rope_theta", 1e6),
            tie_word_embeddings=_flag(config, "config.json", "tie_word_embeddings"),
        )._checked("config.json")

    @classmethod
    def from_mistral(cls, params: Mapping[str, Any]) -> MixtralConfig:
        """From a Mistral folder's params.json, as mistral_inference reads it."""
        moe = params.get("moe")
        if not isinstance(moe, dict):
            raise BatchmixError("params.json: has no `moe`, so it is no Mixtral (batchmix runs mixtral only)")
        PARAMS.check(params)
        _refuse_others(MOE, moe)
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
        )._checked("params.json")

    def _checked(self, file: str) -> MixtralConfig:
        """Itself, if its sizes fit together."""
        if self.head_dim % 2:
            raise BatchmixError(f"{file}: head_dim is {self.head_dim}; it must be even, for rotary pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise BatchmixError(
                f"{file}: {self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} key-value heads"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise BatchmixError(
                f"{file}: num_experts_per_tok is {self.num_experts_per_tok}, more than the {self.num_local_experts} experts"
            )
        return self

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


def window_of(values: Mapping[str, Any], file: str) -> int | None:
    """`sliding_window`, the number of tokens that a token attends to; None: all."""
    window = values.get("sliding_window")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise BatchmixError(f"{file}: sliding_window is {shown(window)}; it must be null or a whole number from 1")
    return window


def token_ids(values: Mapping[str, Any], file: str, key: str) -> tuple[int, ...]:
    """values[key], a token id, a list of them or null."""
    value = values.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise BatchmixError(f"{file}: {key} is {shown(value)}; it must be a token id, a list of them or null")
    return tuple(dict.fromkeys(ids))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters from where transformers takes them: rope_scaling, else rope_parameters, and rope_theta for both."""
    found = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            raise BatchmixError(f"config.json: {key} is {shown(value)}, no object")
        if value:
            _refuse_others(ROPE, value)
            found[key] = value
    rope = found.get("rope_scaling") or found.get("rope_parameters") or {}
    return {"rope_theta": config.get("rope_theta")} | {key: value for key, value in rope.items() if value is not None}


def _refuse_others(keys: Keys, values: Mapping[str, Any]) -> None:
    """As `check`, and no key but those that we know: others here change the network."""
    keys.check(values)
    for key, value in values.items():
        if key not in keys.used and key not in keys.only and value is not None:
            raise BatchmixError(f"{keys.file}: {shown(key)[1:-1]}={shown(value)} is not supported")


def _number(values: Mapping[str, Any], where: str, key: str, default: Any = None) -> int:
    """values[key], or the default where that is missing or null; BatchmixError where it is no size."""
    value = default if values.get(key) is None else values[key]
    limit = _LIMITS[_NAMES.get(key, key)]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise BatchmixError(f"{where}: {key} is {_given(value)}; it must be a whole number from 1 to {limit:,}")
    return value


def _real(values: Mapping[str, Any], where: str, key: str, default: float | None) -> float:
    value = default if values.get(key) is None else values[key]
    # A whole number beyond 2**63 may be none that a float holds.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 2**63:
        raise BatchmixError(f"{where}: {key} is {_given(value)}; it must be a number above 0")
    return float(value)


def _flag(values: Mapping[str, Any], where: str, key: str) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise BatchmixError(f"{where}: {key} is {shown(value)}; it must be true or false")
    return bool(value)


def _given(value: object) -> str:
    return "missing" if value is None else shown(value)
