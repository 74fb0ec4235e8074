"""The operators against their formulas, and against themselves with other rows and other numbers of threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engines import threads

from batchmix.models import torch_ops


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_moe(x, router, w13, w2, top_k):
    out = torch.zeros_like(x)
    for t, token in enumerate(x):
        weights, experts = (router @ token).softmax(-1).topk(top_k)
        for weight, expert in zip(weights / weights.sum(), experts, strict=True):
            gate, up = (w13[expert] @ token).chunk(2)
            out[t] += weight * (w2[expert] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (2, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("tokens", [16, 48, 128])
def test_moe_is_the_sum_over_the_chosen_experts(tokens, experts, top_k):
    x, router = random(tokens, 24), random(experts, 24, seed=1)
    w13, w2 = random(experts, 80, 24, seed=2) * 0.2, random(experts, 24, 40, seed=3) * 0.2
    assert torch.allclose(
        torch_ops.moe(x, router, w13, w2, top_k), naive_moe(x, router, w13, w2, top_k), rtol=1e-4, atol=1e-5
    )


def test_moe_when_one_expert_gets_every_token():
    x = random(64, 16).abs()
    router = torch.zeros(4, 16)
    router[2], router[0] = 1.0, 0.5
    w13, w2 = random(4, 40, 16, seed=2), random(4, 16, 20, seed=3)
    assert torch.allclose(torch_ops.moe(x, router, w13, w2, 2), naive_moe(x, router, w13, w2, 2), rtol=1e-4, atol=1e-4)


def test_rms_norm_and_rotation_are_their_formulas():
    x, weight = random(16, 24), random(24, seed=1)
    expected = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(torch_ops.rms_norm(x, weight, 1e-5), expected, atol=1e-6)
    heads, angle = random(16, 3, 8), random(16, 4, seed=2)
    turned = torch_ops.rotate(heads, angle.cos(), angle.sin())
    pairs = torch.complex(heads[..., :4], heads[..., 4:]) * torch.polar(torch.ones(16, 1, 4), angle[:, None])
    assert torch.allclose(turned, torch.cat((pairs.real, pairs.imag), -1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_silu_times_up_and_safe_at_the_ends(dtype):
    x = torch.cat((random(16, 64) * 3, random(16, 64, seed=1)), -1).to(dtype)
    x[0, :4] = torch.tensor([1e4, -1e4, 0.0, -200.0])
    gate, up = x.chunk(2, -1)
    found = torch_ops.swiglu(x.clone())
    assert found.dtype == dtype
    assert torch.allclose(found, F.silu(gate) * up, rtol=1e-5 if dtype == torch.float32 else 2e-2)


def test_swiglu_bits_do_not_depend_on_rows_and_threads():
    x = random(224, 2 * 4000)  # above 32,768 numbers torch cuts the work into one share a thread, anywhere
    with threads(1):
        expected = torch_ops.swiglu(x)
    for count in (2, 3, 5, 6):
        with threads(count):
            for rows in (16, 48, 112, 224):
                assert torch.equal(torch_ops.swiglu(x[:rows]), expected[:rows]), (count, rows)


def test_moe_bits_do_not_depend_on_company_and_threads():
    x, router = random(304, 32), random(8, 32, seed=1)
    w13, w2 = random(8, 2 * 600, 32, seed=2), random(8, 32, 600, seed=3)
    expected = torch_ops.moe(x, router, w13, w2, 2)
    order = torch.randperm(304, generator=torch.Generator().manual_seed(4))
    for count in (1, 3):
        with threads(count):
            assert torch.equal(torch_ops.moe(x[:16], router, w13, w2, 2), expected[:16])
            assert torch.equal(torch_ops.moe(x[order], router, w13, w2, 2), expected[order])
