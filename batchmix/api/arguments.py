"""The arguments of `LLM`, which have vLLM's names, as the configuration of a job."""

from __future__ import annotations

import dataclasses
import logging
import os
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

from batchmix.api.names import NO_EFFECT, NOT_THERE, asks_for_nothing, refuse
from batchmix.checkpoints.config import ModelConfig
from batchmix.config import Config
from batchmix.config_checks import check
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.output.config import OutputConfig

_log = logging.getLogger(__name__)

SAME = {
    "dtype": "model.dtype", "kv_cache_dtype": "model.kv_cache_dtype", "max_model_len": "model.max_model_len",
    "quantization": "model.quantization", "revision": "model.revision",
    "tensor_parallel_size": "model.tensor_parallel_size", "chat_template": "data.chat_template",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "max_num_batched_tokens": "engine.max_num_batched_tokens", "max_num_seqs": "engine.max_num_seqs",
}  # fmt: skip
"""vLLM's arguments that are keys of a job by the same name."""

OWN = {
    "format": "model.format", "offload": "model.offload", "offload_dir": "model.offload_dir",
    "backend": "engine.backend", "batch_invariant": "engine.batch_invariant", "cuda_graphs": "engine.cuda_graphs",
    "device": "engine.device", "share_prefix": "engine.share_prefix", "sort_window": "engine.sort_window",
    "max_buffered_bytes": "data.max_buffered_bytes",
}  # fmt: skip
"""Further keys of a job that may be arguments."""

# What vLLM's arguments have by themselves, or may have here without asking for anything.
_PASSING: Mapping[str, tuple[Any, ...]] = {
    "data_parallel_size": (1,), "pipeline_parallel_size": (1,), "logprobs_mode": ("raw_logprobs",),
    "runner": ("generate",), "task": ("generate",), "convert": ("none",), "load_format": ("safetensors", "hf"),
    "config_format": ("hf",),
}  # fmt: skip
_DTYPES = {"half": "float16", "float": "float32"}
_PREQUANTIZED: set[Any] = {"awq", "awq_marlin", "gptq", "gptq_marlin", "compressed-tensors", "bitsandbytes"}


def job_config(model: str | os.PathLike[str], given: Mapping[str, Any]) -> Config:
    """The configuration that the arguments of an `LLM` ask for. TypeError for one that is not there, ValueError for a value
    that no machine can run with."""
    known = SAME | OWN
    others = {name: value for name, value in given.items() if name not in known and not _passes(name, value)}
    refuse("LLM", {n: v for n, v in others.items() if n not in NO_EFFECT}, NOT_THERE, [*known, *NO_EFFECT])
    for name, value in others.items():
        if not asks_for_nothing(value):
            _log.info("LLM: %s has no effect here: %s", name, NO_EFFECT[name])
    values: dict[str, dict[str, Any]] = {"model": {"path": os.fspath(model)}, "data": {"path": ""}, "engine": {}}
    for name, value in given.items():
        if name in known and value is not None:
            group, _, key = known[name].partition(".")
            values[group][key] = _value(name, value)
    if (method := values["model"].get("quantization")) in _PREQUANTIZED:
        raise ValueError(f"quantization={method!r}: a checkpoint that is quantised so loads as it is; leave it out")
    groups: dict[str, Any] = {"model": ModelConfig, "data": DataConfig, "engine": EngineConfig}
    built = {group: groups[group](**_enums(groups[group], keys)) for group, keys in values.items()}
    try:
        return check(Config(**built, output=OutputConfig(dir="")))
    except (BatchmixError, TypeError) as error:
        raise ValueError(str(error)) from None


def _passes(name: str, value: Any) -> bool:
    return name in NOT_THERE | NO_EFFECT and (asks_for_nothing(value) or value in _PASSING.get(name, ()))


def _value(name: str, value: Any) -> Any:
    """In the words of a job's key."""
    if name == "dtype":
        text = str(value).removeprefix("torch.")
        return _DTYPES.get(text, text)
    if name == "kv_cache_dtype" and value == "fp8_e4m3":
        return "fp8"
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _enums(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an enum's members as those. ValueError for a value of the wrong type."""
    hints = typing.get_type_hints(cls)
    kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    found = dict(values)
    for name, value in values.items():
        if enum := _enum(hints[name]):
            if value not in enum.__members__:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(enum.__members__)}")
            found[name] = enum[value]
        elif not _fits(value, kinds[name]):
            raise ValueError(f"{name}={value!r}: must be {kinds[name].removesuffix(' | None')}")
    return found


def _enum(hint: Any) -> type[Enum] | None:
    """The enum of `hint`, an enum or a union with one."""
    kinds = (hint, *typing.get_args(hint))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)), None)


def _fits(value: Any, kind: str) -> bool:
    """Whether a value is of the type of a key, as the dataclass writes it."""
    if kind.startswith("bool"):
        return isinstance(value, bool)
    if kind.startswith(("int", "float")):
        return not isinstance(value, bool) and isinstance(value, int if kind.startswith("int") else int | float)
    return not kind.startswith("str") or isinstance(value, str)
