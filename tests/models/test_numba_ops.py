"""The numba backend's operators against the torch backend's, and against themselves among other rows and on other threads."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import threads
from torch import Tensor

from batchmix.models import torch_backend, torch_ops
from batchmix.models.expert_load import LayerLoad
from batchmix.models.kv_cache import KVCache
from batchmix.models.numba_cache import DTYPES
from batchmix.models.numba_ops import SPLIT, NumbaOperators
from batchmix.models.step_tokens import DecodeTokens, PrefillChunk, StepTokens

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def ops(dtype) -> NumbaOperators:
    return NumbaOperators(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [1, 7, 24, 256, 1000])
def test_norms_are_the_torch_backends(ops, dtype, width):
    residual, x, weight = (normal(rows, width, seed=rows, dtype=dtype) for rows in (32, 33, 1))
    x, weight = x[:32], weight[0]
    expected_sum, expected = torch_ops.add_rms_norm(residual, x, weight, 1e-5)
    assert_close(ops.rms_norm(x, weight, 1e-5), torch_ops.rms_norm(x, weight, 1e-5))
    total, found = ops.add_rms_norm(residual.clone(), x, weight, 1e-5)
    assert torch.equal(total, expected_sum)
    assert_close(found, expected)


def test_swiglu_is_the_torch_backends_and_safe_at_the_ends(ops, dtype):
    x = torch.cat((normal(16, 70) * 3, normal(16, 70, seed=1)), -1).to(dtype)
    x[0, :6] = torch.tensor([1e4, -1e4, 0.0, -200.0, 88.5, -88.5])
    assert_close(ops.swiglu(x), torch_ops.swiglu(x.clone()))
    x[1, 0], x[2, 0], x[3, 70] = float("nan"), float("inf"), float("nan")
    found = ops.swiglu(x)
    assert found[1, 0].isnan()
    assert found[3, 0].isnan()
    assert found[2, 0] == torch_ops.swiglu(x)[2, 0]
    assert int(found.isnan().sum()) == 2


def test_silu_in_float32_is_off_by_no_more_than_three_units_of_the_last_place():
    gate = torch.linspace(-80, 80, 1 << 16).view(64, -1)
    found = NumbaOperators(torch.float32).swiglu(torch.cat((gate, torch.ones_like(gate)), 1))
    exact = gate.double() * gate.double().sigmoid()
    assert float(((found - exact) / exact.abs().clamp(min=1e-30)).abs().max()) < 3 * 2**-23


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (2, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("tokens", [16, 128])
def test_moe_is_the_torch_backends(ops, dtype, tokens, experts, top_k):
    x, residual = normal(tokens, 24, dtype=dtype), normal(tokens, 24, seed=5, dtype=dtype)
    router = normal(experts, 24, seed=1)
    w13, w2 = (normal(experts, *shape, seed=2, dtype=dtype) * 0.2 for shape in ((80, 24), (24, 40)))
    for valid in (None, tokens - 3):
        num_valid = torch.tensor([tokens if valid is None else valid])
        loads = [LayerLoad(torch.zeros(experts, dtype=torch.int64), num_valid) for _ in range(2)]
        expected = torch_ops.moe(x, router, w13, w2, top_k, residual, loads[0])
        assert_close(ops.moe(x, router, w13, w2, top_k, residual, loads[1]), expected)
        assert loads[0].counts.tolist() == loads[1].counts.tolist()


def test_moe_when_one_expert_gets_every_token(ops, dtype):
    x, router = normal(64, 16).abs().to(dtype), torch.zeros(4, 16)
    router[2], router[0] = 1.0, 0.5
    w13, w2 = (normal(4, *shape, seed=2, dtype=dtype) * 0.3 for shape in ((40, 16), (16, 20)))
    residual = torch.zeros_like(x)
    expected = torch_ops.moe(x, router, w13, w2, 2, residual)
    assert_close(ops.moe(x, router, w13, w2, 2, residual, None), expected)


def test_bits_depend_on_neither_rows_nor_threads(ops, dtype):
    """Of norm, SwiGLU and experts; with more than 32,768 elements, from which on several threads share them."""
    x, residual, weight = (normal(608, 128, seed=seed, dtype=dtype) for seed in range(3))
    router = normal(8, 128, seed=4)
    w13, w2 = (normal(8, *shape, seed=5, dtype=dtype) * 0.1 for shape in ((192, 128), (128, 96)))
    order = torch.randperm(608, generator=torch.Generator().manual_seed(6))

    def outputs(rows: Tensor) -> list[Tensor]:
        own, own_residual = x[rows], residual[rows]
        return [
            ops.rms_norm(own, weight[0], 1e-5),
            *ops.add_rms_norm(own_residual.clone(), own, weight[0], 1e-5),
            ops.swiglu(torch.cat((own, own_residual), 1)),
            ops.moe(own, router, w13, w2, 2, own_residual, None),
        ]

    expected = outputs(torch.arange(608))
    for count in (1, 2, 3, 5):
        with threads(count):
            for rows in (torch.arange(608), order, order[:16], torch.arange(160, 272)):
                for found, whole in zip(outputs(rows), expected, strict=True):
                    assert torch.equal(found, whole[rows]), (count, len(rows))


# kv heads, query heads per kv head, head dim, block size
SHAPES = [(2, 1, 16, 16), (1, 2, 8, 16), (2, 4, 32, 16), (1, 8, 10, 16), (2, 4, 128, 64)]
CONTEXTS = [1, 2, 3, 5, 16, 17, 63, 64, 65, 80, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 7]


def attention_model(kv_heads: int, ratio: int, dim: int, dtype: torch.dtype) -> Any:
    """As much of a model as attention asks for."""
    angles = torch.outer(torch.arange(2 * SPLIT + 64.0), 1e4 ** -(torch.arange(0, dim, 2) / dim))
    config = SimpleNamespace(
        num_hidden_layers=1, num_attention_heads=kv_heads * ratio, num_key_value_heads=kv_heads, head_dim=dim
    )
    weights = SimpleNamespace(embedding=torch.zeros(1, dtype=dtype))
    return SimpleNamespace(config=config, weights=weights, cos=angles.cos(), sin=angles.sin())


def decode_step(context: list[int], blocks: list[list[int]], running: list[bool]) -> StepTokens:
    table = np.zeros((len(context), max(map(len, blocks))), np.int32)
    for row, own in enumerate(blocks):
        table[row, : len(own)] = own
    positions = np.array(context) - 1
    decode = DecodeTokens(torch.from_numpy(positions), torch.tensor(running), torch.from_numpy(table), positions, table)
    return StepTokens(-(-len(context) // 16) * 16, decode)


@pytest.mark.parametrize(("kv_heads", "ratio", "dim", "size"), SHAPES)
def test_decode_attention_is_the_torch_backends_and_keeps_its_bits(ops, dtype, kv_heads, ratio, dim, size):
    model = attention_model(kv_heads, ratio, dim, dtype)
    num_blocks = [-(-length // size) for length in CONTEXTS]
    free = iter(random.Random(0).sample(range(1, sum(num_blocks) + 1), sum(num_blocks)))
    blocks = [[next(free) for _ in range(count)] for count in num_blocks]
    caches = [KVCache(model.config, sum(num_blocks) + 1, size, dtype, torch.device("cpu")) for _ in range(2)]
    keys, values = (normal(*caches[0].keys.shape, seed=seed, dtype=dtype) for seed in (1, 2))
    qkv = normal(len(CONTEXTS), (ratio + 2) * kv_heads * dim, seed=3, dtype=dtype)
    qkv = torch.cat((qkv, qkv[:2]))  # padding

    def attend(backend: Any, cache: KVCache, rows: list[int], running: list[bool] | None = None) -> Tensor:
        cache.keys.copy_(keys)
        cache.values.copy_(values)
        own = running or [True] * len(rows)
        step = decode_step([CONTEXTS[row] for row in rows], [blocks[row] for row in rows], own)
        x = qkv[[*rows, *[15] * (step.size - len(rows))]]
        return backend.attend(model, cache, step)(0, x.clone())[: len(rows)]

    everyone = list(range(len(CONTEXTS)))
    expected = attend(torch_backend, caches[0], everyone)
    found = attend(ops, caches[1], everyone)
    assert_close(found, expected)
    for mine, theirs in ((caches[1].keys, caches[0].keys), (caches[1].values, caches[0].values)):
        assert_close(mine[:, 1:], theirs[:, 1:])  # but for the scratch block
    for count in (1, 2, 3):
        with threads(count):
            for rows in (everyone, everyone[::-1], [13], [0, 12], [5, 13, 2]):
                assert torch.equal(attend(ops, caches[1], rows), found[rows]), (count, rows)
    running = [row != 13 for row in everyone]
    assert torch.equal(attend(ops, caches[1], everyone, running)[:13], found[:13])
    block = blocks[13][(CONTEXTS[13] - 1) // size]
    assert torch.equal(caches[1].keys[0, block], keys[0, block]), "rows that have ended write to the scratch block"


def test_prompts_are_attended_to_as_by_the_torch_backend(ops, dtype):
    model, lengths = attention_model(2, 4, 32, dtype), [1, 2, 33, 60, 130]
    caches = [KVCache(model.config, 40, 16, dtype, torch.device("cpu")) for _ in range(2)]
    chunks, offset, block = [], 0, 1
    for length in lengths:
        count = -(-length // 16)
        chunks.append(PrefillChunk(offset, 0, length, range(block, block + count)))
        offset, block = offset + length, block + count
    step = StepTokens(-(-offset // 16) * 16, None, chunks)
    qkv = normal(step.size, 16 * 32 - 4 * 32, seed=4, dtype=dtype)
    found, expected = (
        backend.attend(model, cache, step)(0, qkv.clone())
        for backend, cache in zip((ops, torch_backend), caches, strict=True)
    )
    assert_close(found[:offset], expected[:offset])
    assert_close(caches[0].keys[:, 1:], caches[1].keys[:, 1:])
    assert torch.equal(caches[0].values[:, 1:], caches[1].values[:, 1:])


def test_a_cache_in_fp8_is_left_to_the_torch_backend(ops, dtype):
    model = attention_model(1, 2, 16, dtype)
    cache = KVCache(model.config, 3, 16, torch.float8_e4m3fn, torch.device("cpu"))
    step = decode_step([5], [[1]], [True])
    qkv = normal(step.size, 4 * 16, dtype=dtype)
    found, expected = (backend.attend(model, cache, step)(0, qkv.clone()) for backend in (ops, torch_backend))
    assert torch.equal(found, expected)
