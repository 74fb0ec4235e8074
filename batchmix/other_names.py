"""What vLLM, transformers, OpenAI and curator have by other names, and what they have and batchmix has not."""

from __future__ import annotations

RENAMED = {
    "max_new_tokens": "sampling.max_tokens",
    "max_completion_tokens": "sampling.max_tokens",
    "max_output_tokens": "sampling.max_tokens",
    "max_length": "sampling.max_tokens (of the answer alone)",
    "min_new_tokens": "sampling.min_tokens",
    "num_return_sequences": "sampling.n",
    "do_sample": "sampling.temperature, with 0 for greedy decoding",
    "top_logprobs": "sampling.logprobs",
    "eos_token_id": "sampling.stop_token_ids",
    "stop_strings": "sampling.stop",
    "stop_sequences": "sampling.stop",
    "bad_words": "sampling.logit_bias, with -100 for a token to ban",
    "random_seed": "sampling.seed",
    "guided_json": "sampling.structured_outputs.json",
    "guided_choice": "sampling.structured_outputs.choice",
    "guided_regex": "sampling.structured_outputs.regex",
    "guided_decoding": "sampling.structured_outputs",
    "response_format": "sampling.structured_outputs.json",
    "model_id": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "load_in_8bit": "model.quantization=int8",
    "load_in_4bit": "model.quantization=int4",
    "load_format": "model.format",
    "cpu_offload_gb": "model.offload",
    "device_map": "model.offload or model.tensor_parallel_size",
    "batch_size": "engine.max_num_seqs",
    "num_gpus": "engine.data_parallel_size or model.tensor_parallel_size",
    "enforce_eager": "engine.cuda_graphs=false",
    "enable_prefix_caching": "engine.share_prefix",
    "attn_implementation": "engine.backend",
    "input_file": "data.path",
    "input_path": "data.path",
    "data_files": "data.path",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "dataset_path": "data.path",
    "prompts": "data.path",
    "max_samples": "data.limit",
    "num_samples": "data.limit",
    "text_column": "data.prompt_column",
    "prompt_template": "data.template",
    "system_message": "data.system_prompt",
    "output_file": "output.dir",
    "output_dir": "output.dir",
    "output_path": "output.dir",
    "save_path": "output.dir",
    "working_dir": "output.dir",
}
_NO_BEAMS = "there is no beam search; sampling.n draws several answers"
_NO_LORA = "LoRA adapters are not loaded; merge one first, with PEFT's merge_and_unload() and save_pretrained()"
_NO_TOOLS = "chat templates are rendered without tools; a system prompt can describe them"
_NO_DRAFTS = "there is no speculative decoding"
ABSENT = {
    "best_of": "there is no best-of; sampling.n answers come out, each with its cumulative_logprob to choose by",
    "use_beam_search": _NO_BEAMS,
    "num_beams": _NO_BEAMS,
    "beam_width": _NO_BEAMS,
    "length_penalty": _NO_BEAMS,
    "prompt_logprobs": "there are no log-probabilities of prompts; sampling.logprobs gives those of answers",
    "echo": "an answer does not repeat its prompt; data.columns names the input's columns to keep beside it",
    "guided_grammar": "grammars in EBNF are not read; sampling.structured_outputs has choice, regex and json",
    "logits_processors": "no user's code runs in a step; sampling has logit_bias, allowed_token_ids and"
    " structured_outputs",
    "no_repeat_ngram_size": "n-grams are not banned; sampling has repetition_penalty and frequency_penalty",
    "typical_p": "there is no typical sampling; sampling has top_p, top_k and min_p",
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "tokenizer": "the tokenizer is that of model.path",
    "trust_remote_code": "checkpoints run no code; leave it out",
    "lora": _NO_LORA,
    "lora_path": _NO_LORA,
    "lora_modules": _NO_LORA,
    "lora_request": _NO_LORA,
    "enable_lora": _NO_LORA,
    "adapter": _NO_LORA,
    "enable_chunked_prefill": "prompts are always computed in chunks; engine.max_num_batched_tokens bounds a step",
    "block_size": "the kernels set the size of KV blocks; leave it out",
    "swap_space": "nothing is swapped: preempted rows start over; leave it out",
    "pipeline_parallel_size": "there is no pipeline parallelism; model.tensor_parallel_size splits a model",
    "speculative_config": _NO_DRAFTS,
    "speculative_model": _NO_DRAFTS,
    "limit_mm_per_prompt": "prompts are text alone; leave it out",
    "resume": "every run resumes: run the same command again",
}


def explain_other_name(name: str) -> str | None:
    """What to use in place of another engine's `name`; None of a name that is not known."""
    if key := RENAMED.get(name):
        return f"here it is {key}"
    return ABSENT.get(name)
