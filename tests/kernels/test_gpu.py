from __future__ import annotations

import pytest
import torch

from batchmix.kernels.gpu import H200, INTERPRETER, MI300X, assume_gpu, current_gpu


def test_the_interpreter_has_a_gpu_of_its_own(device: torch.device) -> None:
    if device.type == "cpu":
        assert current_gpu(device) == INTERPRETER


def test_assumptions_nest_and_end(device: torch.device) -> None:
    before = current_gpu(device)
    with assume_gpu(H200):
        assert current_gpu(device) == H200
        with assume_gpu(MI300X):
            assert current_gpu(torch.device("meta")) == MI300X
        assert current_gpu(device) == H200
    assert current_gpu(device) == before


def test_cpu_tensors_without_the_interpreter_get_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # triton's knobs read it each time
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        current_gpu(torch.device("cpu"))


@pytest.mark.gpu
def test_the_gpu_at_hand_is_described(device: torch.device) -> None:
    gpu = current_gpu(device)
    assert gpu.name == torch.cuda.get_device_name()
    assert gpu.arch.startswith(("sm_", "gfx"))
    assert gpu.num_sms > 4
    assert gpu.shared_memory >= 48 * 1024
