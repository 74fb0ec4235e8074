"""A tiny random Mixtral of transformers' gives the same logits with our kernels as with its own eager code."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import batchmix.for_transformers  # noqa: F401, the one import that registers everything

BOTH = {"experts_implementation": "batchmix", "attn_implementation": "batchmix"}


def tiny(**options: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        max_position_embeddings=256,
        **{"sliding_window": None, "hidden_act": "silu", **options},
    )
    return MixtralForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager").eval()


@pytest.fixture(scope="module")
def eager(device: torch.device) -> MixtralForCausalLM:
    return tiny().to(device)


def with_kernels(eager: MixtralForCausalLM, **implementations: str) -> MixtralForCausalLM:
    model = copy.deepcopy(eager)
    if "attn_implementation" in implementations:
        model.set_attn_implementation(implementations["attn_implementation"])
    if "experts_implementation" in implementations:
        model.set_experts_implementation(implementations["experts_implementation"])
    return model


def random_ids(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.parametrize("implementations", [BOTH, *({key: value} for key, value in BOTH.items())], ids=str)
def test_logits(eager: MixtralForCausalLM, implementations: dict[str, str], device: torch.device) -> None:
    ids = random_ids(2, 21, device)
    with torch.no_grad():
        expected = eager(ids).logits
        actual = with_kernels(eager, **implementations)(ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "length", [13, pytest.param(64, marks=pytest.mark.slow)]
)  # 64: whole blocks, but for the row that begins at 3
def test_padded_rows(eager: MixtralForCausalLM, side: str, length: int, device: torch.device) -> None:
    ids = random_ids(3, length, device)
    mask = torch.ones_like(ids)
    mask[1, 3 - length :] = 0
    mask[2, -3:] = 0
    mask = mask.flip(1) if side == "left" else mask
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask).logits[mask.bool()]
        actual = with_kernels(eager, **BOTH)(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(eager: MixtralForCausalLM) -> None:
    ids = random_ids(2, 21, torch.device("cuda:1"))
    model = with_kernels(eager, **BOTH).to("cuda:1")
    with torch.no_grad(), torch.cuda.device(0):
        expected = copy.deepcopy(eager).to("cuda:1")(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.slow  # 5 s under the interpreter
def test_generated_tokens(eager: MixtralForCausalLM, device: torch.device) -> None:
    ids = random_ids(2, 9, device)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = eager.generate(ids, **options)
    assert torch.equal(with_kernels(eager, **BOTH).generate(ids, **options), expected)


@pytest.mark.slow  # seconds under the interpreter, or of processes
def test_chunked_prompt(eager: MixtralForCausalLM, device: torch.device) -> None:
    ids = random_ids(2, 20, device)
    model = with_kernels(eager, **BOTH)
    with torch.no_grad():
        first = model(ids[:, :11], use_cache=True)
        second = model(ids[:, 11:], past_key_values=first.past_key_values)
        expected = eager(ids).logits
    actual = torch.cat((first.logits, second.logits), 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sliding_window": 4}, "without sliding windows"), ({"hidden_act": "gelu"}, "for SwiGLU experts")],
    ids=str,
)
def test_models_that_the_kernels_do_not_compute(options: dict[str, Any], message: str, device: torch.device) -> None:
    model = with_kernels(tiny(**options).to(device), **BOTH)
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 8, device))


@pytest.mark.slow  # seconds under the interpreter, or of processes
def test_padding_inside_a_row(eager: MixtralForCausalLM, device: torch.device) -> None:
    mask = torch.tensor([[1, 0, 1, 1]], device=device)
    with pytest.raises(ValueError, match="not inside it"):
        with_kernels(eager, **BOTH)(random_ids(1, 4, device), attention_mask=mask)


@pytest.mark.slow  # seconds under the interpreter, or of processes
def test_a_mask_of_ones_own(eager: MixtralForCausalLM, device: torch.device) -> None:
    mask = torch.zeros(1, 1, 4, 4, device=device)
    with pytest.raises(ValueError, match="its own mask"):
        with_kernels(eager, **BOTH)(random_ids(1, 4, device), attention_mask=mask)


@pytest.mark.slow  # seconds under the interpreter, or of processes
def test_a_static_cache(eager: MixtralForCausalLM, device: torch.device) -> None:
    with pytest.raises(ValueError, match='cache_implementation="dynamic"'):
        with_kernels(eager, **BOTH).generate(
            random_ids(1, 4, device), max_new_tokens=2, cache_implementation="static", pad_token_id=0
        )


@pytest.mark.slow  # 5 s and more
def test_cpu_without_the_interpreter() -> None:
    code = """
import torch, batchmix.for_transformers
from transformers import MixtralConfig, MixtralForCausalLM
config = MixtralConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
                       num_key_value_heads=1, num_local_experts=2)
kwargs = {"attn_implementation": "eager", "experts_implementation": "batchmix"}
MixtralForCausalLM._from_config(config, **kwargs)(torch.zeros(1, 4, dtype=torch.int64))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "set TRITON_INTERPRET=1 before" in run.stderr.splitlines()[-1]
