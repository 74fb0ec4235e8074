"""Which device and backend a job runs on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from batchmix.dtypes import Quantization
from batchmix.engine.config import CPU_BACKENDS, Backend, EngineConfig
from batchmix.errors import BatchmixError
from batchmix.models import numba_cache
from batchmix.models.mixtral_config import MixtralConfig

_TRITON_HEAD_DIMS = (32, 64, 128)  # a head is a tile's width, a power of two
_TRITON_VOCABULARY = 2**19 - 1  # kernels/draw.py: sums of weights stay exact


@dataclass(frozen=True)
class DevicePlan:
    """A device, and the backend that runs there."""

    device: torch.device
    backend: Backend  # not auto

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


def select_device(engine: EngineConfig) -> DevicePlan:
    """BatchmixError where the device or backend asked for cannot be had."""
    device = _device(engine)
    backend = engine.backend
    if backend is Backend.auto and device.type == "cuda":
        backend = Backend.triton
    elif backend is Backend.auto:
        backend = Backend.torch if numba_cache.unavailable() else Backend.numba
    if backend in CPU_BACKENDS and device.type == "cuda":
        raise BatchmixError(
            f"engine.backend={backend.value} runs on the CPU, not on engine.device={engine.device}; leave one of the two out"
        )
    if backend is Backend.numba and (missing := numba_cache.unavailable()):
        raise BatchmixError(f"engine.backend=numba: {missing}; engine.backend=torch needs neither")
    # Whether Triton will interpret its kernels; read as Triton does, without importing it.
    interprets = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    if backend is Backend.triton and device.type == "cpu" and not interprets:
        raise BatchmixError(
            "engine.backend=triton: needs a GPU; use engine.backend=torch"
            " (or set TRITON_INTERPRET=1 to try the kernels on the CPU, very slowly)"
        )
    return DevicePlan(device, backend)


def nth_device(first: torch.device, place: int) -> torch.device:
    """The GPU `place` places after the first; there is one CPU."""
    return first if first.type == "cpu" else torch.device(first.type, (first.index or 0) + place)


def check_places(engine: EngineConfig, tensor_parallel_size: int) -> None:
    """BatchmixError where there are fewer GPUs than the run has processes, or the first cannot be had."""
    first = select_device(engine).device
    needed = engine.data_parallel_size * tensor_parallel_size
    if first.type == "cuda" and (first.index or 0) + needed > torch.cuda.device_count():
        raise BatchmixError(
            f"engine.data_parallel_size={engine.data_parallel_size} model.tensor_parallel_size={tensor_parallel_size}:"
            f" need {needed} GPUs from {first} on; torch sees {torch.cuda.device_count()}"
        )


def compute_dtype(dtype: torch.dtype, place: DevicePlan) -> torch.dtype:
    """In which dtype weights of `dtype` are kept and multiplied; BatchmixError where the place cannot. In float32 on a CPU
    without matrix instructions for it, which multiplies seven times slower than float32 (on AVX2)."""
    if place.backend is Backend.triton:
        if place.device.type == "cpu" and dtype is torch.bfloat16:
            raise BatchmixError(
                "model.dtype=bfloat16: Triton's interpreter multiplies bfloat16 wrongly;"
                " use model.dtype=float32 or float16"
            )
        return dtype
    needed = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}.get(dtype)
    there = torch.cpu.get_capabilities()
    return dtype if needed is None or any(there.get(name) for name in needed) else torch.float32


def check_model(config: MixtralConfig, place: DevicePlan, quantization: Quantization | None = None) -> None:
    """BatchmixError for a model whose shape or format the backend's kernels do not take."""
    if place.backend is not Backend.triton:
        return
    # Triton has products of e4m3 on AMD's GPUs, and on NVIDIA's from sm_89 on.
    on_nvidia = place.device.type == "cuda" and torch.version.hip is None
    if quantization is Quantization.fp8 and on_nvidia and torch.cuda.get_device_capability(place.device) < (8, 9):
        raise BatchmixError(
            f"model.quantization=fp8: {place.name} does not multiply e4m3; use model.quantization=int8 or int4"
        )
    if config.head_dim not in _TRITON_HEAD_DIMS:
        raise BatchmixError(
            f"engine.backend=triton: its kernels take heads of {', '.join(map(str, _TRITON_HEAD_DIMS))} values, this"
            f" model's have {config.head_dim}; use engine.backend=torch"
        )
    if config.vocab_size > _TRITON_VOCABULARY:
        raise BatchmixError(
            f"engine.backend=triton: its sampler takes {_TRITON_VOCABULARY:,} tokens at most, this model has"
            f" {config.vocab_size:,}; use engine.backend=torch"
        )


def _device(engine: EngineConfig) -> torch.device:
    if engine.device == "auto":
        on_gpu = engine.backend not in CPU_BACKENDS and torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    kind, _, index = engine.device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise BatchmixError(f"engine.device={engine.device}: must be auto, cpu, cuda, cuda:1, ...")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BatchmixError(f"engine.device={engine.device}: torch sees no GPU here; use engine.device=cpu")
    if int(index or 0) >= torch.cuda.device_count():
        raise BatchmixError(f"engine.device={engine.device}: torch sees {torch.cuda.device_count()} GPUs, from cuda:0")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())
