"""Which device and backend a job gets, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchmix.dtypes import Quantization
from batchmix.engine.config import Backend, EngineConfig
from batchmix.engine.device import DevicePlan, check_model, compute_dtype, select_device
from batchmix.errors import BatchmixError
from batchmix.models import numba_cache
from batchmix.planning.memory import gpu_cache_bytes, kv_blocks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ON_CPU, ON_GPU = DevicePlan(CPU, Backend.triton), DevicePlan(GPU, Backend.triton)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that torch sees this many."""

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    return see


def place(device: str = "auto", backend: str = "auto") -> DevicePlan:
    return select_device(EngineConfig(device=device, backend=Backend[backend]))


def test_auto_is_triton_on_a_gpu_and_numba_on_a_cpu_where_it_is(gpus, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpus(0)
    assert place() == place("cpu") == place(backend="numba") == DevicePlan(CPU, Backend.numba)
    assert place(backend="torch") == DevicePlan(CPU, Backend.torch)
    monkeypatch.setattr(numba_cache, "find_spec", lambda name: None)
    assert place() == place("cpu") == DevicePlan(CPU, Backend.torch)
    gpus(2)
    assert place() == place("cuda") == place("cuda:0", "triton") == ON_GPU
    assert place("cuda:1").device.index == 1
    assert place("cpu") == place(backend="torch") == DevicePlan(CPU, Backend.torch)


def test_numba_that_is_not_there_is_refused(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(numba_cache, "find_spec", lambda name: None)
    with pytest.raises(BatchmixError, match=r"^engine\.backend=numba: numba and llvmlite cannot be imported"):
        place(backend="numba")


@pytest.mark.parametrize(
    ("count", "device", "backend", "message"),
    [
        (0, "cuda", "auto", "torch sees no GPU here"),
        (0, "cpu", "triton", "needs a GPU; use engine.backend=torch"),
        (0, "auto", "triton", "needs a GPU"),
        (2, "cuda:2", "auto", "torch sees 2 GPUs, from cuda:0"),
        (2, "cuda", "torch", "engine.backend=torch runs on the CPU"),
        (2, "cuda", "numba", "engine.backend=numba runs on the CPU"),
        (2, "mps", "auto", "engine.device=mps: must be auto, cpu, cuda"),
        (2, "cuda:x", "auto", "engine.device=cuda:x: must be auto, cpu, cuda"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(gpus, monkeypatch, count, device, backend, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpus(count)
    with pytest.raises(BatchmixError, match=message) as error:
        place(device, backend)
    assert "\n" not in str(error.value)


def test_the_interpreter_runs_triton_on_a_cpu_but_not_in_bfloat16(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert place(backend="triton") == ON_CPU
    assert compute_dtype(torch.float16, ON_CPU) is torch.float16
    assert compute_dtype(torch.bfloat16, ON_GPU) is torch.bfloat16
    with pytest.raises(BatchmixError, match=r"interpreter multiplies bfloat16 wrongly; use model\.dtype=float32"):
        compute_dtype(torch.bfloat16, ON_CPU)


def test_models_that_the_kernels_do_not_take(gpus):
    def model(**changes: int) -> Any:
        return SimpleNamespace(**{"head_dim": 128, "vocab_size": 32000, **changes})

    check_model(model(), ON_GPU)
    check_model(model(head_dim=80, vocab_size=2**20), DevicePlan(CPU, Backend.torch))
    with pytest.raises(BatchmixError, match="32, 64, 128 values, this model's have 80"):
        check_model(model(head_dim=80), ON_GPU)
    with pytest.raises(BatchmixError, match="524,287 tokens at most"):
        check_model(model(vocab_size=2**20), ON_GPU)


@pytest.mark.parametrize(
    ("capability", "hip", "refused"), [((8, 0), None, True), ((8, 9), None, False), ((9, 4), "6.4", False)]
)
def test_fp8_where_triton_has_no_products_of_it(gpus, monkeypatch, capability, hip, refused):
    model: Any = SimpleNamespace(head_dim=128, vocab_size=32000)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.version, "hip", hip)
    check_model(model, ON_GPU, Quantization.int4)
    with pytest.raises(BatchmixError, match="NVIDIA A100 does not multiply e4m3; use") if refused else nullcontext():
        check_model(model, ON_GPU, Quantization.fp8)


def test_the_cache_gets_what_is_left_of_a_gpu():
    gib = 2**30
    assert gpu_cache_bytes(50 * gib, 140 * gib, 3 * gib, 0.9) == pytest.approx(33 * gib, abs=10)
    assert kv_blocks(gpu_cache_bytes(50 * gib, 140 * gib, 3 * gib, 0.9), 8 << 20, 512, 1024) == 33 * 128
    with pytest.raises(BatchmixError, match=r"needs 4\.00 GiB and 0\.00 GiB are left"):
        kv_blocks(gpu_cache_bytes(10 * gib, 140 * gib, 3 * gib, 0.9), 8 << 20, 512, 1024)
