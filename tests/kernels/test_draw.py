"""Thresholds and draws on given weights, whose sums are exact on both sides; random bits."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchmix.kernels import reference
from batchmix.kernels.draw import draw, threshold_of, uniform_bits
from batchmix.models import philox


@triton.jit
def threshold_kernel(weights, top_k, top_p, min_p, out, V, BLOCK: tl.constexpr):
    found = threshold_of(weights, V, tl.load(top_k), tl.load(top_p), tl.load(min_p), BLOCK)
    tl.store(out, found.to(tl.float32, bitcast=True))


@triton.jit
def draw_kernel(weights, random_bits, threshold, out, V, BLOCK: tl.constexpr):
    bits = tl.load(random_bits).to(tl.uint64, bitcast=True)
    tl.store(out, draw(weights, V, tl.load(threshold).to(tl.int32, bitcast=True), bits, BLOCK))


@triton.jit
def bits_kernel(seed, row_key, sample, position, out):
    i = tl.program_id(0)
    bits = uniform_bits(tl.load(seed + i), tl.load(row_key + i), tl.load(sample + i), tl.load(position + i))
    tl.store(out + i, bits.to(tl.int64, bitcast=True))


def threshold(weights: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, block: int = 128) -> float:
    device, out = weights.device, weights.new_empty(1)
    limits = torch.tensor([top_k], device=device), *torch.tensor([[top_p], [min_p]], device=device)
    threshold_kernel[(1,)](weights, *limits, out, len(weights), BLOCK=block)
    return float(out)


def drawn(weights: Tensor, u: float, least: float = 0.0, block: int = 128) -> int:
    """u in units of 2^-52."""
    bits = torch.tensor([(int(u * 2**52) << 12 | 2048) - 2**63], device=weights.device) ^ -(2**63)
    out = torch.empty(1, dtype=torch.int64, device=weights.device)
    draw_kernel[(1,)](weights, bits, torch.tensor([least], device=weights.device), out, len(weights), BLOCK=block)
    return int(out)


def whole_weights(seed: int, vocab: int, steps: int, device: torch.device) -> Tensor:
    """Multiples of 1 / steps, a power of two, with ties and zeros; the largest is 1."""
    source = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, steps + 1, (vocab,), generator=source) / steps
    weights[torch.rand(vocab, generator=source) < 0.3] = 0
    weights[int(torch.randint(0, vocab, (1,), generator=source))] = 1
    return weights.to(device)


VOCABULARIES = st.sampled_from([1, 2, 127, 128, 129, 300, 1000])


@pytest.mark.slow  # 5 s and more
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    VOCABULARIES,
    st.sampled_from([1, 4, 1024]),
    st.sampled_from([-1, 0, 1, 2, 50, 127, 299, 1000, 5000]),
    st.sampled_from([1.0, 0.5, 0.25, 0.75, 0.9, 0.01]),
    st.sampled_from([0.0, 0.25, 0.3, 1.0]),
)
def test_thresholds_are_exact(device, seed, vocab, steps, top_k, top_p, min_p):
    weights = whole_weights(seed, vocab, steps, device)
    top_p, min_p = float(torch.tensor(top_p)), float(torch.tensor(min_p))  # as float32 has them
    expected = reference.kept(weights.double(), top_k, top_p, min_p)
    kept = weights >= threshold(weights, top_k, top_p, min_p)
    assert torch.equal(kept & (weights > 0), expected & (weights > 0))


def test_a_sum_that_meets_top_p_exactly_is_enough(device):
    weights = torch.tensor([0.5, 1.0, 0.25, 0.25], device=device)
    assert threshold(weights, top_p=0.5) == 1.0
    assert threshold(weights, top_p=0.75) == 0.5
    assert threshold(weights, top_p=0.7501) == 0.25
    # Of the two that tie for the third place of a top-k one counts: 1.75, half of it is less than 1.
    assert threshold(weights, top_k=3, top_p=0.57) == 1.0
    assert threshold(weights, top_k=3, top_p=0.58) == 0.5


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    VOCABULARIES,
    st.sampled_from([1, 4, 2**20]),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.sampled_from([0.0, 0.25, 1.0]),
)
def test_draws_invert_the_running_sum(device, seed, vocab, steps, u, least):
    weights = whole_weights(seed, vocab, steps, device)
    u = (int(u * 2**52) + 0.5) / 2**52 if u < 1 - 2**-50 else 1 - 2**-53
    token = drawn(weights, u, least)
    assert token == reference.draw(torch.where(weights >= least, weights, 0.0), u)
    assert weights[token] >= max(least, 1 / steps)


def test_draws_at_the_very_ends_are_possible_tokens(device):
    weights = torch.zeros(1000, device=device)
    weights[[300, 301, 699, 700, 701]] = torch.tensor([0.3, 1e-30, 0.0, 1.0, 1e-30], device=device)
    assert [drawn(weights, u) for u in (0.0, 1 - 2.0**-52)] == [300, 700]


@pytest.mark.slow  # seconds under the interpreter, or of processes
def test_tiles_do_not_matter(device):
    weights = torch.rand(300, generator=torch.Generator().manual_seed(0)).to(device)
    weights[17] = 1
    assert len({threshold(weights, 150, 0.8, 0.1, block) for block in (64, 256, 1024)}) == 1
    assert len({drawn(weights, 0.77, 0.3, block) for block in (64, 256, 1024)}) == 1


@pytest.mark.parametrize(
    "key", [(0, 0, 0, 0), (-1, -1, 3, 9), (2**63 - 1, -(2**63), 2**31, 2**33 + 5), (7, 123456789, 1, 2)]
)
def test_random_bits_are_the_engines(device, key):
    tensors = [torch.tensor([part, part], device=device) for part in key]
    out = torch.empty(2, dtype=torch.int64, device=device)
    bits_kernel[(2,)](*tensors, out)
    number = (int(out[0]) % 2**64 >> 11) * 2.0**-53
    assert number == float(philox.uniform(*tensors)[0]) == reference.uniform(*key)
    assert out[0] == out[1]


def test_random_bits_of_a_published_vector(device):
    """Counter and key zero give 6627e8d5 e169c58d ...: kat_vectors of Random123 1.14."""
    zero, out = torch.zeros(1, dtype=torch.int64, device=device), torch.empty(1, dtype=torch.int64, device=device)
    bits_kernel[(1,)](zero, zero, zero, zero, out)
    assert int(out[0]) % 2**64 == (0x6627E8D5 >> 6) << 38 | (0xE169C58D >> 6) << 12 | 2048
