"""The torch backend's operators against the kernels' oracles, and bitwise against themselves in other company."""

from __future__ import annotations

import pytest
import torch

from batchmix.kernels import reference
from batchmix.model import torch_ops

TOKENS, HIDDEN, WIDTH, EXPERTS = 48, 32, 24, 8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operators(x: torch.Tensor, module) -> dict[str, torch.Tensor]:
    heads = x.view(len(x), 4, -1)
    angles = random(len(x), heads.shape[-1] // 2, seed=5)
    return {
        "rms_norm": module.rms_norm(x, random(HIDDEN, seed=1), 1e-5),
        "rotate": module.rotate(heads, angles.cos(), angles.sin()),
        "moe": module.moe(
            x, random(EXPERTS, HIDDEN, seed=2), random(EXPERTS, 2 * WIDTH, HIDDEN, seed=3),
            random(EXPERTS, HIDDEN, WIDTH, seed=4), 2,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["rms_norm", "rotate", "moe"])
def test_operators_equal_their_oracles(name):
    x = random(TOKENS, HIDDEN)
    torch.testing.assert_close(operators(x, torch_ops)[name], operators(x, reference)[name], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [16, 32, 48])
def test_a_token_does_not_depend_on_the_others(count):
    x = random(TOKENS, HIDDEN)
    weights = (
        random(EXPERTS, HIDDEN, seed=2),
        random(EXPERTS, 2 * WIDTH, HIDDEN, seed=3),
        random(EXPERTS, HIDDEN, WIDTH, seed=4),
    )
    whole = torch_ops.moe(x, *weights, 2)
    chosen = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))[:count]
    assert torch.equal(torch_ops.moe(x[chosen], *weights, 2), whole[chosen])


def test_experts_without_tokens():
    x = random(1, HIDDEN).expand(16, HIDDEN).contiguous()  # all tokens choose the same two
    weights = (
        random(EXPERTS, HIDDEN, seed=2),
        random(EXPERTS, 2 * WIDTH, HIDDEN, seed=3),
        random(EXPERTS, HIDDEN, WIDTH, seed=4),
    )
    torch.testing.assert_close(torch_ops.moe(x, *weights, 2), reference.moe(x, *weights, 2), atol=2e-4, rtol=1e-4)


def test_reference_attention_is_sdpa():
    q, k, v = random(5, 4, 8), random(9, 2, 8, seed=1), random(9, 2, 8, seed=2)
    mask = torch.arange(9) <= torch.arange(4, 9)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(reference.attention(q, k, v), expected.transpose(0, 1))
