from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, FP8, ON_GPU, assert_bitwise_equal, poison, poisoned_allocations
from slow_cases import slow_after
from torch import Tensor

from batchmix.kernels import reference
from batchmix.kernels.rotary import rotate_and_cache
from batchmix.models import torch_ops

MAX_POSITION = 50
BLOCKS, S = 6, 16


def inputs(seed: int, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device,
           cache_dtype: torch.dtype | None = None) -> list[Tensor]:  # fmt: skip
    """Arguments of rotate_and_cache: tokens at places of the cache that are out of order, the cache full of sevens."""
    source = torch.Generator().manual_seed(seed)
    qkv = (torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=source) * 3).to(dtype)
    angles = torch.outer(torch.arange(MAX_POSITION).float(), 1e4 ** -(torch.arange(0, dim, 2) / dim))
    positions = torch.randint(0, MAX_POSITION, (tokens,), generator=source)
    places = torch.randperm(BLOCKS * S, generator=source)[:tokens]
    caches = [torch.full((BLOCKS, kv_heads, S, dim), 7.0).to(cache_dtype or dtype) for _ in range(2)]
    arguments = [qkv, angles.cos(), angles.sin(), positions, places // S, places % S, *caches]
    return [tensor.to(device) for tensor in arguments]


def run(arguments: list[Tensor], *scales: Tensor) -> list[Tensor]:
    """q, and the caches, which are copied before they are changed."""
    *rest, keys, values = arguments
    keys, values = keys.clone(), values.clone()
    with poisoned_allocations():
        q = rotate_and_cache(*rest, keys, values, *scales)
    return [q, keys, values]


def expected(arguments: list[Tensor], *scales: Tensor) -> list[Tensor]:
    *rest, keys, values = (tensor.clone() for tensor in arguments)
    return [reference.rotate_and_cache(*rest, keys, values, *scales), keys, values]


def assert_all_equal(left: list[Tensor], right: list[Tensor]) -> None:
    for one, other in zip(left, right, strict=True):
        assert_bitwise_equal(one, other)


# The interpreter cuts float32 off where it makes bfloat16 of it.
CACHE_DTYPES = [None, torch.float32, torch.float16, FP8, *([torch.bfloat16] if ON_GPU else [])]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.sampled_from([(1, 1), (4, 2), (6, 6), (32, 8), (9, 3)]),
    st.sampled_from([32, 64, 128]),
    st.sampled_from(DTYPES),
    st.sampled_from(CACHE_DTYPES),
)
def test_bits_equal_the_oracles(device, seed, tokens, heads, dim, dtype, cache_dtype):
    arguments = inputs(seed, tokens, *heads, dim, dtype, device, cache_dtype)
    assert_all_equal(run(arguments), expected(arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_equal_the_torch_backends(device, dtype):
    arguments = inputs(1, 20, 8, 2, 128, dtype, device)
    qkv, cos, sin, positions, blocks, offsets, *_ = arguments
    q, keys, values = run(arguments)
    packed = qkv.view(20, 12, 128)
    rotated = torch_ops.rotate(packed[:, :10], cos[positions], sin[positions])
    assert_bitwise_equal(q, rotated[:, :8])
    assert_bitwise_equal(keys[blocks, :, offsets], rotated[:, 8:])
    assert_bitwise_equal(values[blocks, :, offsets], packed[:, 10:])
    written = torch.zeros(BLOCKS, S, dtype=torch.bool, device=device)
    written[blocks, offsets] = True
    for cache in (keys, values):
        assert (cache.transpose(1, 2)[~written] == 7).all()


@pytest.mark.parametrize("dtype", slow_after(1, DTYPES))
def test_fp8_is_scaled_and_clipped(device, dtype):
    arguments = inputs(2, 12, 4, 2, 64, dtype, device, FP8)
    arguments[0][3] *= 1000
    blocks, offsets = arguments[4:6]
    for scales in ([0.37], [1.9]), ([0.37, 2.5], [1.9, 0.01]):
        tensors = [torch.tensor(values, device=device) for values in scales]
        found = run(arguments, *tensors)
        assert_all_equal(found, expected(arguments, *tensors))
        for cache in found[1:]:
            assert cache[blocks, :, offsets].float().abs().max() == 448


def test_every_rounding_to_e4m3(device):
    """Numbers of e4m3, the middles between them and what is next to those; zeros, infinities and NaN."""
    exact = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middles = torch.cat(((exact[1:] + exact[:-1]) / 2, torch.tensor([0.0, 464.0, 1e30, float("inf"), float("nan")])))
    up, down = (torch.nextafter(middles, torch.tensor(end)) for end in (float("inf"), float("-inf")))
    values = torch.cat((exact, middles, up, down, torch.rand(5) * 2**-140))
    values = torch.cat((values, -values))
    tokens = -(-len(values) // 128)
    arguments = inputs(0, tokens, 1, 1, 128, torch.float32, device, FP8)
    arguments[0][:, 256:] = (
        torch.nn.functional.pad(values, (0, tokens * 128 - len(values))).view(tokens, 128).to(device)
    )
    written = run(arguments)[2][arguments[4], 0, arguments[5]].view(torch.uint8).flatten()[: len(values)]
    wanted = values.clamp(-448, 448).to(FP8).view(torch.uint8).to(device)
    number = ~values.isnan().to(device)
    assert torch.equal(written[number], wanted[number])
    assert (written[~number] & 0x7F == 0x7F).all()


def test_a_token_does_not_depend_on_its_neighbours(device):
    arguments = inputs(3, 9, 4, 2, 64, torch.float32, device)
    alone = [tensor[5:6] if len(tensor) == 9 else tensor for tensor in arguments]
    (q, keys, values), (q1, keys1, values1) = run(arguments), run(alone)
    block, offset = int(arguments[4][5]), int(arguments[5][5])
    assert_bitwise_equal(q1[0], q[5])
    assert_bitwise_equal(keys1[block, :, offset], keys[block, :, offset])
    assert_bitwise_equal(values1[block, :, offset], values[block, :, offset])


def test_a_row_stride_and_a_poisoned_cache(device):
    arguments = inputs(4, 5, 2, 1, 32, torch.float16, device)
    wide = torch.full((5, 200), float("nan"), dtype=torch.float16, device=device)
    wide[:, 40:168] = arguments[0]
    poison(*arguments[6:])
    assert_all_equal(run([wide[:, 40:168], *arguments[1:]]), expected(arguments))


def test_no_tokens(device):
    assert run(inputs(5, 0, 2, 1, 32, torch.float16, device))[0].shape == (0, 2, 32)


def test_custom_op_is_well_formed(device):
    torch.library.opcheck(rotate_and_cache.op, tuple(inputs(6, 3, 2, 1, 32, torch.float32, device)))
