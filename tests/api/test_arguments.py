"""The arguments of `LLM`: vLLM's names as a job's keys, and what is said of those that are not there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from batchmix import LLM
from batchmix.api.arguments import job_config
from batchmix.api.names import NO_EFFECT, NOT_THERE
from batchmix.checkpoints.config import ModelFormat
from batchmix.dtypes import Dtype, KVCacheDtype, Quantization
from batchmix.engine.config import Backend


def test_arguments_are_keys_of_a_job() -> None:
    config = job_config(Path("/m"), {
        "dtype": "half", "quantization": "fp8", "kv_cache_dtype": "fp8_e4m3", "max_model_len": 100, "max_num_seqs": 7,
        "max_num_batched_tokens": 900, "gpu_memory_utilization": 0.5, "tensor_parallel_size": 2, "revision": "r",
        "chat_template": "{{ x }}", "backend": "torch", "format": "random", "cuda_graphs": False, "sort_window": 5,
    })  # fmt: skip
    assert (config.model.path, config.model.dtype, config.model.quantization) == ("/m", Dtype.float16, Quantization.fp8)
    assert (config.model.kv_cache_dtype, config.model.max_model_len) == (KVCacheDtype.fp8, 100)
    assert (config.model.tensor_parallel_size, config.model.revision) == (2, "r")
    assert (config.model.format, config.data.chat_template) == (ModelFormat.random, "{{ x }}")
    engine = config.engine
    assert (engine.max_num_seqs, engine.max_num_batched_tokens, engine.gpu_memory_utilization) == (7, 900, 0.5)
    assert (engine.backend, engine.cuda_graphs, engine.sort_window) == (Backend.torch, False, 5)
    assert job_config("tiny", {"dtype": torch.bfloat16, "max_num_batched_tokens": None}).model.dtype is Dtype.bfloat16


def test_eager_and_prefix_caching(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = []

    def stop(model: str, given: dict[str, Any]) -> None:
        found.append(given)
        raise KeyError

    monkeypatch.setattr("batchmix.api.llm.job_config", stop)
    for arguments in ({"enforce_eager": True, "enable_prefix_caching": False}, {}):
        with pytest.raises(KeyError):
            LLM("tiny", **arguments)
    assert (found[0]["cuda_graphs"], found[0]["share_prefix"]) == (False, False)
    assert not {"cuda_graphs", "share_prefix"} & set(found[1])


def test_arguments_that_change_nothing_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name, why in NO_EFFECT.items():
        caplog.clear()
        job_config("tiny", {name: "x"})
        assert [record.getMessage() for record in caplog.records] == [f"LLM: {name} has no effect here: {why}"]
    caplog.clear()
    job_config("tiny", {"trust_remote_code": False, "swap_space": 0, "task": "generate", "load_format": "safetensors"})
    assert not caplog.records


def test_arguments_that_are_not_there_say_what_to_use() -> None:
    for name, remedy in NOT_THERE.items():
        with pytest.raises(TypeError) as raised:
            job_config("tiny", {name: 3})
        assert str(raised.value) == f"LLM: {name} is not there; {remedy}"
        job_config("tiny", {name: None})
    job_config("tiny", {"pipeline_parallel_size": 1, "data_parallel_size": 1, "logprobs_mode": "raw_logprobs"})
    with pytest.raises(TypeError, match=r"LLM: there is no argument max_num_seq; did you mean max_num_seqs\?"):
        job_config("tiny", {"max_num_seq": 3})
    with pytest.raises(TypeError, match=r"LLM: there is no argument zzz; docs/coming-from-vllm\.md lists"):
        job_config("tiny", {"zzz": 3})
    with pytest.raises(TypeError, match="LLM: tokenizer is not there; the tokenizer is the model folder's"):
        LLM("tiny", tokenizer="other")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8': must be one of auto, bfloat16, float16, float32"),
        ({"quantization": "awq"}, "quantization='awq': a checkpoint that is quantised so loads as it is; leave it out"),
        ({"gpu_memory_utilization": 2}, "engine.gpu_memory_utilization=2: must be above 0, at most 1"),
        ({"max_num_seqs": "many"}, "max_num_seqs='many': must be int"),
        ({"max_num_seqs": 0}, "engine.max_num_seqs=0: must be at least 1"),
        ({"max_model_len": True}, "max_model_len=True: must be int"),
        ({"cuda_graphs": 1}, "cuda_graphs=1: must be bool"),
    ],
)
def test_wrong_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        job_config("tiny", given)
    assert str(raised.value) == message


def test_wrong_model_and_generation_config() -> None:
    with pytest.raises(Exception, match=r"model\.path=/nowhere: no such folder"):
        LLM("/nowhere")
    with pytest.raises(ValueError, match="generation_config='x': must be auto or vllm"):
        LLM("tiny", generation_config="x")
