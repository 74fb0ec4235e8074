"""Attention over the paged cache against a plain softmax, and against itself in other company and other blocks."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import threads

from batchmix.models.kv_cache import KVCache
from batchmix.models.step_tokens import PrefillChunk
from batchmix.models.torch_attention import DecodeAttention, PrefillAttention

# kv heads, query heads per kv head, head dim, block size
SHAPES = [(2, 1, 16, 16), (1, 2, 8, 16), (2, 4, 32, 16), (1, 8, 10, 16), (2, 4, 128, 64)]


def make_cache(kv_heads: int, dim: int, size: int, blocks: int, dtype: torch.dtype = torch.float32) -> KVCache:
    config: Any = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=kv_heads, head_dim=dim)
    cache = KVCache(config, blocks + 1, size, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    cache.keys.normal_(generator=generator)  # what lies in blocks and places that a row does not own never counts
    cache.values.normal_(generator=generator)
    return cache


def naive(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One row's causal attention: q [t, H, C] are the last t of its keys and values [T, G, C] -> [t, H, C]."""
    repeat = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhc,khc->hqk", q, keys) * q.shape[-1] ** -0.5
    hidden = torch.ones(len(q), len(keys), dtype=torch.bool).triu(len(keys) - len(q) + 1)
    return torch.einsum("hqk,khc->qhc", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


def tensors(tokens: int, kv_heads: int, repeat: int, dim: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = [(tokens, kv_heads * repeat, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def prefill(
    cache: KVCache, chunks: list[PrefillChunk], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Write the chunks' keys and values of layer 0 and attend."""
    for chunk in chunks:
        place, span = (
            np.arange(chunk.start, chunk.start + chunk.length),
            slice(chunk.offset, chunk.offset + chunk.length),
        )
        blocks = np.array(chunk.blocks)[place // cache.block_size]
        cache.write(0, *map(torch.from_numpy, (blocks, place % cache.block_size)), k[span], v[span])
    out = torch.zeros_like(q)
    PrefillAttention(cache, chunks)(0, q, k, v, out)
    return out


@pytest.mark.parametrize(("kv_heads", "repeat", "dim", "size"), SHAPES)
def test_prefill_of_packed_prompts(kv_heads, repeat, dim, size):
    lengths = [1, 2, 31, 32, 33, 60, 61, 60, 130]
    cache = make_cache(kv_heads, dim, size, 60)
    q, k, v = tensors(sum(lengths) + 7, kv_heads, repeat, dim)  # 7 padding tokens
    blocks = iter(random.Random(0).sample(range(1, 61), 60))
    chunks, offset = [], 0
    for length in lengths:
        chunks.append(PrefillChunk(offset, 0, length, [next(blocks) for _ in range(-(-length // size))]))
        offset += length
    together = prefill(cache, chunks, q, k, v)
    for chunk in chunks:
        span = slice(chunk.offset, chunk.offset + chunk.length)
        assert torch.allclose(together[span], naive(q[span], k[span], v[span]), atol=1e-5)
        for place in range(chunk.length):
            block, at = chunk.blocks[place // size], place % size
            assert torch.equal(cache.keys[0, block, :, at], k[chunk.offset + place])
            assert torch.equal(cache.values[0, block, :, at], v[chunk.offset + place])
        for count in (1, 3):
            with threads(count):
                alone = [PrefillChunk(0, 0, chunk.length, chunk.blocks)]
                assert torch.equal(prefill(cache, alone, q[span], k[span], v[span]), together[span])


@pytest.mark.parametrize(("kv_heads", "repeat", "dim", "size"), SHAPES)
def test_a_prompt_in_chunks(kv_heads, repeat, dim, size):
    cache = make_cache(kv_heads, dim, size, 40)
    q, k, v = tensors(390, kv_heads, repeat, dim)
    blocks = random.Random(0).sample(range(1, 41), -(-390 // size))
    expected = naive(q, k, v)
    for start, end in [(0, 70), (70, 71), (71, 360), (360, 390)]:  # 289 queries are more than one tile
        chunk = PrefillChunk(0, start, end - start, blocks)
        found = prefill(cache, [chunk], q[start:end], k[start:end], v[start:end])
        assert torch.allclose(found, expected[start:end], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "repeat", "dim", "size"), SHAPES)
def test_decode(kv_heads, repeat, dim, size, dtype):
    source = random.Random(2)
    context = np.array([1, 2, size, size + 1, 5 * size] + [source.randint(1, 5 * size) for _ in range(11)])
    rows, num_blocks = len(context), -(-context // size)
    q, k, v = tensors(32, kv_heads, repeat, dim, dtype)  # 16 rows are padding
    noise = make_cache(kv_heads, dim, size, 200, dtype)

    def step(order: list[int], blocks_from: int) -> dict[int, torch.Tensor]:
        """Attention of these rows, whose blocks begin at `blocks_from` of a cache that is otherwise noise."""
        cache = copy.copy(noise)
        cache.keys, cache.values = noise.keys.clone(), noise.values.clone()
        table, free = np.zeros((len(order), 5), np.int64), iter(range(blocks_from, 201))
        for slot, row in enumerate(order):
            table[slot, : num_blocks[row]] = [next(free) for _ in range(num_blocks[row])]
            generator = torch.Generator().manual_seed(int(row))
            for block in table[slot, : num_blocks[row]]:
                for cached in (cache.keys, cache.values):
                    cached[0, block] = torch.randn(kv_heads, size, dim, generator=generator).to(dtype)
        attend = DecodeAttention(cache, table[:, : num_blocks[order].max()], context[order])
        assert attend.in_place == (blocks_from == 1)
        picked = torch.tensor(order + list(range(16, 32)))
        last = context[order] - 1
        written = table[np.arange(len(order)), last // size], last % size
        cache.write(0, *map(torch.from_numpy, written), k[order], v[order])
        out = torch.zeros_like(q)
        attend(0, q[picked], out)
        assert not out[len(order) :].any()
        if len(order) == rows and dtype == torch.float32:
            for slot, row in enumerate(order):
                keys, values = (
                    cached[0, table[slot, : num_blocks[row]]].transpose(1, 2).flatten(0, 1)[: context[row]]
                    for cached in (cache.keys, cache.values)
                )
                assert torch.equal(keys[-1], k[row])
                assert torch.allclose(out[slot], naive(q[row, None], keys, values)[0], atol=1e-5)
        return dict(zip(order, out, strict=False))

    everyone = list(range(rows))
    expected = step(everyone, 1)
    others = [
        step(source.sample(everyone, rows), 1),
        step(source.sample(everyone, rows), 120),  # far from dense: gathered
        *(step([row], 1) for row in everyone),
        *(step([row], 100) for row in everyone),
        step([3, 1], 1),
    ]
    with threads(3):
        others.append(step(everyone, 1))
    for other in others:
        for row, out in other.items():
            assert torch.equal(out, expected[row]), row
