"""What becomes of each key of a checkpoint's configuration files; docs/checkpoints.md has it as a table.

Every key that transformers' Mixtral or mistral_inference reads is here; a test compares them with the installed
transformers. A key is used, or runs with certain values `only`, or has no effect on what is generated. A key that is
not here changes nothing in transformers either and is named in a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from batchmix.errors import BatchmixError
from batchmix.json_file import shown


@dataclass(frozen=True)
class Keys:
    """The keys of one file."""

    file: str
    used: frozenset[str]
    only: Mapping[str, tuple[Any, ...]]  # the values that we run with, beside null and nothing; of a list, all items
    without_effect: frozenset[str]
    settings: Mapping[str, Any] = field(default_factory=dict)  # generation settings with transformers' defaults

    def check(self, values: Mapping[str, Any]) -> None:
        """BatchmixError for a value that asks for another network than the one that we run."""
        for key, allowed in self.only.items():
            value = values.get(key)
            if value is None or value == [] or value == {}:
                continue
            if not all(item in allowed for item in (value if isinstance(value, list) else [value])):
                wanted = " or ".join(map(repr, allowed)) if allowed else "null"
                raise BatchmixError(f"{self.file}: {key}={shown(value)} is not supported; it must be {wanted}")

    def notes(self, values: Mapping[str, Any]) -> list[str]:
        """A line each for generation settings, which are not taken from the file, and for keys that nobody knows."""
        known = self.used | self.only.keys() | self.without_effect
        given = {key: value for key, value in values.items() if key not in known and value is not None}
        settings = [
            f"{key}={shown(value)}"
            for key, value in given.items()
            if key in self.settings and value != self.settings[key]
        ]
        unknown = [shown(key)[1:-1] for key in given if key not in self.settings]
        lines = []
        if settings:
            lines.append(f"{self.file}: {', '.join(settings)}: not used; only sampling.* says how answers are drawn")
        if unknown:
            more = f" and {len(unknown) - 20} more" if unknown[20:] else ""
            lines.append(
                f"{self.file}: nothing reads {', '.join(unknown[:20])}{more}; transformers' Mixtral does not either"
            )
        return lines


# Of generation_config.json, and of the config.json of old releases. All that could change an answer, with the values that
# transformers takes where there is none; None: not set.
_SETTINGS: dict[str, Any] = {
    "max_length": 20, "max_new_tokens": None, "min_length": 0, "min_new_tokens": None, "early_stopping": False,
    "max_time": None, "stop_strings": None, "do_sample": False, "num_beams": 1, "num_beam_groups": 1,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "top_h": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0, "diversity_penalty": 0.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None, "force_words_ids": None, "constraints": None, "renormalize_logits": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "remove_invalid_values": False,
    "exponential_decay_length_penalty": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "sequence_bias": None, "token_healing": None, "guidance_scale": None, "watermarking_config": None,
    "penalty_alpha": None, "dola_layers": None, "num_return_sequences": 1,
}  # fmt: skip

# How transformers' generate works and what it returns besides the answers, and drafts, which change no distribution.
_MECHANICS = frozenset({
    "use_cache", "use_mtp", "cache_implementation", "cache_config", "max_cache_len", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile",
    "continuous_batching_config", "low_memory", "prefill_chunk_size", "pad_token_id", "bos_token_id",
    "decoder_start_token_id", "_from_model_config", "transformers_version", "_commit_hash",
})  # fmt: skip

GENERATION_CONFIG = Keys("generation_config.json", frozenset({"eos_token_id"}), {}, _MECHANICS, _SETTINGS)

CONFIG = Keys(
    "config.json",
    used=frozenset({
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "num_local_experts", "num_experts", "num_experts_per_tok",
        "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "sliding_window",
        "tie_word_embeddings", "eos_token_id", "dtype", "torch_dtype", "quantization_config", "compression_config",
        "batchmix_tokenizer",
    }),
    only={
        "architectures": ("MixtralForCausalLM",),
        "hidden_act": ("silu", "swish"),  # two names of one function in transformers
        "partial_rotary_factor": (1.0,),
        "attention_bias": (False,), "mlp_bias": (False,),
        "layer_types": ("full_attention",), "mlp_layer_types": ("sparse",),
        "per_layer_config": (), "pruned_heads": (),
        "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    },
    without_effect=_MECHANICS | {
        # of training
        "attention_dropout", "router_jitter_noise", "output_router_logits", "router_aux_loss_coef",
        "initializer_range", "gradient_checkpointing",
        # of other heads than the language model's
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
        "classifier_dropout",
        # of what transformers returns, of how it computes, and of where the file comes from
        "return_dict", "torchscript", "chunk_size_feed_forward", "tie_last_hidden_states", "is_decoder",
        "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
        "_attn_implementation_autoset", "experts_implementation", "_experts_implementation",
        "_experts_implementation_internal", "_flash_attn_2_enabled", "pretraining_tp", "name_or_path",
        "_name_or_path", "auto_map", "tokenizer_class", "prefix", "sep_token_id", "use_bfloat16",
        "tf_legacy_loss", "tie_encoder_decoder", "cross_attention_hidden_size", "unsloth_version", "unsloth_fixed",
    },
    settings=_SETTINGS,
)  # fmt: skip

# Inside rope_parameters, and rope_scaling as older files call it.
ROPE = Keys(
    "config.json: rope_parameters",
    used=frozenset({"rope_theta"}),
    only={"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0,)},
    without_effect=frozenset(),
)

PARAMS = Keys(
    "params.json",
    used=frozenset({
        "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size", "rope_theta",
        "max_seq_len", "moe", "sliding_window",
    }),
    only={
        "model_type": ("transformer",),
        "use_biases": (False,), "tied_embeddings": (False,), "causal": (True,), "norm_type": ("rms",),
        "_sliding_window": (), "lora": (), "vision_encoder": (), "yarn": (), "quantization": (),
        "q_lora_rank": (), "kv_lora_rank": (),
    },
    without_effect=frozenset({"max_batch_size"}),
)  # fmt: skip

MOE = Keys("params.json: moe", frozenset({"num_experts", "num_experts_per_tok"}), {}, frozenset())
