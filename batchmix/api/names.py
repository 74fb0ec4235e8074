"""Names of vLLM's API that batchmix has no use for: what stands in their place, for messages and for the documentation."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any


def asks_for_nothing(value: Any) -> bool:
    """Whether a value is what vLLM's argument has where it is not given."""
    return value is None or value is False or value in (0, "", "auto") or value in ([], (), {}, set())


def refuse(where: str, given: Mapping[str, Any], not_there: Mapping[str, str], known: Collection[str]) -> None:
    """TypeError for an argument that is not there, with what to use; one that asks for nothing is let pass.

    `where`: whose arguments they are. `not_there`: vLLM's names, with what to use. `known`: names that are there.
    """
    for name, value in given.items():
        if name in not_there:
            if not asks_for_nothing(value):
                raise TypeError(f"{where}: {name} is not there; {not_there[name]}")
            continue
        raise TypeError(f"{where}: there is no argument {name}; {_hint(name, not_there, known)}")


def refuse_attribute(where: str, name: str, not_there: Mapping[str, str], known: Collection[str]) -> None:
    """AttributeError for an attribute that is not in `known`, with what to use."""
    if name in not_there:
        raise AttributeError(f"{where}: {name} is not there; {not_there[name]}")
    if name not in known:
        raise AttributeError(f"{where}: there is no attribute {name}; {_hint(name, not_there, known)}")


def _hint(name: str, not_there: Mapping[str, str], known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, [*known, *not_there], n=1)
    if not near:
        return "docs/coming-from-vllm.md lists those that there are"
    remedy = f" it is not there; {not_there[near[0]]}" if near[0] in not_there else ""
    return f"did you mean {near[0]}?{remedy}"


_LORA = "merge the adapter into its base model and give the merged folder (peft: merge_and_unload)"
_TEXT = "prompts are text or token ids"
_ANSWERS = "only answers are generated"
_CLOSE = "close() gives the memory back, and another LLM(...) loads the model again"
_NO_CODE = "no code of a model folder ever runs"
_TRACE = "batchmix.run('generate', ['engine.trace=true', ...]) writes a trace"
_CHUNKS = "long prompts are always cut into chunks"
_SIZES = "sizes follow from max_num_seqs"

CALL = {
    "lora_request": _LORA,
    "priority": "all prompts are planned together, and outputs keep their order",
    "tokenization_kwargs": "encode the prompts yourself and give token ids",
    "mm_processor_kwargs": _TEXT,
    "prompt_token_ids": "give the token ids as the prompts: generate([[1, 2, 3], ...])",
    "guided_options_request": "use SamplingParams(structured_outputs=StructuredOutputsParams(...))",
    "prompt_adapter_request": _LORA,
    "chat_template_content_format": "contents are text, or text parts that are joined",
}
"""Arguments of `generate` and `chat`."""

METHODS = {
    "apply_model": "the model is not a torch module of yours to change",
    "beam_search": "sample with SamplingParams(n=...) and pick by cumulative_logprob (logprobs=0)",
    "classify": "use StructuredOutputsParams(choice=[...], score_choices=True), which gives each label's probability",
    "collective_rpc": "there are no workers to call; batchmix.run runs a job on several GPUs or machines",
    "embed": "only answers are generated; use a model for embeddings",
    "encode": "only answers are generated; get_tokenizer().encode makes token ids of a text",
    "enqueue": "call generate with an iterator, which is read while outputs are made",
    "enqueue_chat": "call chat with an iterator, which is read while outputs are made",
    "get_metrics": "batchmix.run(...).summary has what a job measured",
    "llm_engine": "the engine is no part of the API",
    "preprocess_chat": "get_tokenizer().apply_chat_template makes token ids of a conversation",
    "reset_prefix_cache": "nothing is cached between calls",
    "reward": _ANSWERS,
    "score": "use StructuredOutputsParams(choice=[...], score_choices=True), which gives each text's probability",
    "set_tokenizer": "the tokenizer is the model folder's",
    "sleep": _CLOSE,
    "start_profile": _TRACE,
    "stop_profile": _TRACE,
    "wait_for_completion": "generate and chat wait themselves, or return an iterator where they are given one",
    "wake_up": _CLOSE,
}
"""Methods and attributes of `LLM`."""

NO_EFFECT = {
    "aggregate_engine_logging": "there are no periodic statistics",
    "async_scheduling": "steps are always queued ahead",
    "attention_backend": "there is one for each device",
    "attention_config": "there is one attention for each device",
    "block_size": "KV blocks have 64 tokens",
    "compilation_config": "kernels are compiled as they are needed",
    "cpu_offload_gb": "experts that do not fit the GPU are streamed from host memory by themselves (offload='auto')",
    "cuda_graph_sizes": _SIZES,
    "cudagraph_capture_sizes": _SIZES,
    "disable_cascade_attn": "share_prefix=False computes every prompt by itself",
    "disable_custom_all_reduce": "NCCL's is used",
    "disable_hybrid_kv_cache_manager": "all layers have one kind of cache",
    "disable_log_stats": "there are no periodic statistics",
    "disable_nccl_for_dp_synchronization": "models side by side do not synchronise",
    "distributed_executor_backend": "ranks are processes of this machine",
    "enable_chunked_prefill": _CHUNKS,
    "enable_expert_parallel": "ranks hold slices of every expert",
    "guided_decoding_backend": "there is one backend",
    "ignore_patterns": "only what is needed is downloaded",
    "long_prefill_token_threshold": _CHUNKS,
    "max_cudagraph_capture_size": _SIZES,
    "max_logprobs": "up to 100 may be asked for",
    "max_long_partial_prefills": _CHUNKS,
    "max_num_partial_prefills": _CHUNKS,
    "max_parallel_loading_workers": "weights are read one by one",
    "max_seq_len_to_capture": "graphs serve any length",
    "model_impl": "there is one implementation",
    "model_loader_extra_config": "the model folder says what it is",
    "prefix_caching_hash_algo": "prefixes are compared by their tokens",
    "pt_load_map_location": "weights are read to where they run",
    "safetensors_load_strategy": "weights are read one by one",
    "scheduling_policy": "all prompts are planned together",
    "served_model_name": "nothing is served",
    "show_hidden_metrics_for_version": "there are no metrics to show",
    "structured_outputs_config": "there is one backend",
    "swap_space": "a preempted sequence starts over",
    "tokenizer_mode": "the model folder says which tokenizer it has",
    "trust_remote_code": _NO_CODE,
    "use_tqdm_on_load": "the log says what is loaded",
}
"""vLLM's arguments that are taken and change nothing here: a line in the log says why."""

_GROUPED = {
    _TEXT: "allowed_local_media_path allowed_media_domains default_mm_loras disable_chunked_mm_input"
    " disable_mm_preprocessor_cache enable_mm_embeds enable_multimodal_encoder_data_parallel enable_prompt_embeds"
    " interleave_mm_strings io_processor_plugin limit_mm_per_prompt media_io_kwargs mm_encoder_attn_backend"
    " mm_encoder_tp_mode mm_processor_cache_gb mm_processor_cache_type mm_processor_kwargs"
    " mm_shm_cache_max_object_size_mb skip_mm_profiling video_pruning_rate",
    _LORA: "enable_lora fully_sharded_loras lora_dtype lora_extra_vocab_size max_cpu_loras max_lora_rank max_loras",
    "batchmix.run('generate', ['engine.data_parallel_size=2', ...]) runs several models side by side": "data_parallel_address data_parallel_backend data_parallel_hybrid_lb data_parallel_rank data_parallel_rpc_port"
    " data_parallel_size data_parallel_size_local data_parallel_start_rank",
    "every rank holds a slice of every expert; use tensor_parallel_size": "all2all_backend dbo_decode_token_threshold"
    " dbo_prefill_token_threshold enable_dbo enable_eplb eplb_config eplb_log_balancedness eplb_step_interval"
    " eplb_window_size expert_placement_strategy num_redundant_experts",
    "use tensor_parallel_size": "decode_context_parallel_size pipeline_parallel_size",
    "use offload and offload_dir": "offload_group_size offload_num_in_group offload_params offload_prefetch_step",
    "change config.json in a copy of the model folder": "disable_sliding_window hf_overrides override_attention_dtype"
    " rope_scaling rope_theta",
    "Mixtral has no such layers": "mamba_block_size mamba_cache_dtype mamba_ssm_cache_dtype",
    "there is no speculative decoding": "num_lookahead_slots spec_method spec_model spec_tokens speculative_config",
    _ANSWERS: "convert override_pooler_config pooler_config runner task",
    "use format='mistral', or format='random' for random weights": "config_format load_format",
    "use SamplingParams' logit_bias, allowed_token_ids or structured_outputs": "logits_processor_pattern logits_processors",
    "keys and values stay in this process": "kv_events_config kv_sharing_fast_prefill kv_transfer_config",
    "there are no workers or schedulers to exchange": "additional_config external_parameters scheduler_cls worker_cls"
    " worker_extension_cls",
    _TRACE: "collect_detailed_traces otlp_traces_endpoint profiler_config ray_workers_use_nsight",
    "white space in JSON is as docs/guided.md says": "guided_decoding_disable_additional_properties"
    " guided_decoding_disable_any_whitespace guided_decoding_disable_fallback",
}
NOT_THERE = {
    "calculate_kv_scales": "the scales of an fp8 cache are 1",
    "code_revision": _NO_CODE,
    "download_dir": "set HF_HOME",
    "enable_return_routed_experts": "routing is not returned; summary.json of a job counts tokens by expert",
    "enable_sleep_mode": _CLOSE,
    "hf_config_path": "config.json is read from the model folder",
    "hf_token": "set HF_TOKEN",
    "kv_cache_memory_bytes": "use gpu_memory_utilization",
    "logprobs_mode": "log-probabilities are the model's own, vLLM's raw_logprobs",
    "num_gpu_blocks_override": "use gpu_memory_utilization or max_num_seqs",
    "override_generation_config": "use SamplingParams",
    "quantization_config": "use quantization='fp8', 'int8' or 'int4'; quantised checkpoints load as they are",
    "reasoning_parser": "answers come as the model writes them",
    "return_sampling_mask": "use SamplingParams' logprobs",
    "skip_tokenizer_init": "a folder without a tokenizer needs no flag, and then only token ids are prompts",
    "tokenizer_revision": "the tokenizer comes with the model's revision",
} | {name: remedy for remedy, names in _GROUPED.items() for name in names.split()}
"""vLLM's arguments that are not there, and what to use."""
