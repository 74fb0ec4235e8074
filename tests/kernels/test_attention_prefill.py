from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, assert_bitwise_equal, assert_close, poisoned_allocations
from ordered_products import ordered_products  # noqa: F401
from paged import FP8_PAIR, HALF_PAIR, Paged, random_cache
from slow_cases import slow_after
from torch import Tensor

from batchmix.kernels import reference
from batchmix.kernels.attention_prefill import plan_prefill, prefill_attention
from batchmix.kernels.gpu import A100, assume_gpu
from batchmix.kernels.paged_cache import widen

Chunks = list[tuple[int, int]]  # (position in its row, length) each; every chunk is of a row of its own


def packed(chunks: Chunks, gap: int = 0) -> list[tuple[int, int, int]]:
    """(packed offset, position, length), with `gap` padding tokens before each chunk."""
    out, offset = [], 0
    for start, length in chunks:
        out.append((offset + gap, start, length))
        offset += gap + length
    return out


def queries(tokens: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    return torch.randn(tokens, heads, dim, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def run(q: Tensor, paged: Paged, chunks: list[tuple[int, int, int]]) -> Tensor:
    ratio = q.shape[1] // paged.keys.shape[1]
    plan = plan_prefill(chunks, paged.block_table, len(q), ratio, q.dtype)
    with poisoned_allocations():
        return prefill_attention(q, paged.keys, paged.values, *plan, *paged.scales)


def check(chunks, heads, kv_heads, dim, size, dtypes, device, gap=0, padding=0, seed=0) -> None:
    """The kernel equals the oracle, twice with the same bits."""
    query, stored = dtypes
    paged = random_cache([a + b for a, b in chunks], kv_heads, dim, size, stored, device, seed)
    offsets = packed(chunks, gap)
    q = queries(sum(gap + length for _, length in chunks) + padding, heads, dim, query, device, seed)
    out = run(q, paged, offsets)
    expected = reference.prefill_attention(q, paged.keys, paged.values, offsets, paged.block_table, *paged.scales)
    assert_close(out, expected)
    assert_bitwise_equal(run(q, paged, offsets), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 1)],
        [(0, 64)],  # exactly a key tile, and at block edges of every size
        [(0, 65)],
        [(63, 1), (64, 1), (65, 1)],  # later chunks of one token around an edge
        [(0, 33), (0, 1), (128, 40), (7, 100)],
    ],
)
def test_chunks_equal_the_oracle(device, chunks, dtype):
    check(chunks, 4, 2, 32, 16, (dtype, dtype), device)


@pytest.mark.parametrize("size", slow_after(2, [16, 48, 32, 64, 128]))
def test_block_sizes(device, size):
    check([(0, 70), (size - 1, 2), (size, 1), (2 * size, size + 1)], 2, 1, 32, size, HALF_PAIR, device)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), slow_after(2, [(12, 2), (5, 1), (1, 1), (3, 3), (6, 1), (40, 1)], unpack=True)
)
def test_ratios_of_heads(device, heads, kv_heads):
    check([(0, 23), (50, 9)], heads, kv_heads, 32, 16, HALF_PAIR, device)


@pytest.mark.parametrize("dim", slow_after(1, [128, 32, 64]))
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF_PAIR, FP8_PAIR, (torch.float32, FP8_PAIR[1])])
def test_head_dims_and_caches(device, dim, dtypes):
    check([(0, 20), (60, 10)], 4, 2, dim, 16, dtypes, device)


def test_one_scale_for_all_heads(device):
    paged = random_cache([40], 2, 32, 16, FP8_PAIR[1], device)
    q = queries(40, 4, 32, torch.float16, device)
    paged.k_scale, paged.v_scale = (torch.tensor([x], device=device) for x in (0.7, 1.9))
    both = Paged(paged.keys, paged.values, paged.block_table, *(x.expand(2).contiguous() for x in paged.scales))
    assert_bitwise_equal(run(q, paged, [(0, 0, 40)]), run(q, both, [(0, 0, 40)]))


def test_padding_tokens_give_zeros_wherever_they_are(device):
    check([(0, 20), (100, 3)], 4, 2, 32, 16, HALF_PAIR, device, gap=2, padding=13)
    paged = random_cache([1], 2, 32, 16, torch.float16, device)
    assert_bitwise_equal(
        run(queries(70, 4, 32, torch.float16, device), paged, []),
        torch.zeros(70, 4, 32, dtype=torch.float16, device=device),
    )


def test_no_tokens(device):
    paged = random_cache([1], 2, 32, 16, torch.float16, device)
    assert run(queries(0, 4, 32, torch.float16, device), paged, []).shape == (0, 4, 32)


def test_queries_may_be_a_slice_of_qkv(device):
    paged = random_cache([30], 2, 32, 16, torch.float16, device)
    qkv = queries(30, 8, 32, torch.float16, device)
    assert_bitwise_equal(run(qkv[:, :4], paged, [(0, 0, 30)]), run(qkv[:, :4].contiguous(), paged, [(0, 0, 30)]))


@pytest.mark.slow  # seconds under the interpreter, or of processes
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=4),
    st.sampled_from([(2, 1), (2, 2), (6, 2)]),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([HALF_PAIR, FP8_PAIR, *((dtype, dtype) for dtype in DTYPES)]),
    st.integers(0, 20),
    st.integers(0, 2**31),
)
def test_any_step_equals_the_oracle(device, chunks, heads, size, dtypes, padding, seed):
    check(chunks, *heads, 32, size, dtypes, device, padding=padding, seed=seed)


@pytest.mark.parametrize("dtypes", slow_after(1, [HALF_PAIR, FP8_PAIR]))
@pytest.mark.usefixtures("ordered_products")
def test_a_chunk_has_the_same_bits_alone_in_company_and_in_other_blocks(device, dtypes):
    query, stored = dtypes
    chunks = [(0, 70), (64, 65), (130, 1), (5, 33)]
    paged = random_cache([a + b for a, b in chunks], 2, 32, 16, stored, device)
    offsets = packed(chunks)
    q = queries(sum(length for _, length in chunks), 4, 32, query, device)
    together = run(q, paged, offsets)
    assert_bitwise_equal(run(q, paged.moved(3), offsets), together)

    order = [2, 0, 3, 1]
    swapped = packed([chunks[i] for i in order])
    table = paged.block_table[order]
    moved = torch.cat([q[offsets[i][0] : offsets[i][0] + offsets[i][2]] for i in order])
    out = run(moved, Paged(paged.keys, paged.values, table, *paged.scales), swapped)
    for (at, _, length), i in zip(swapped, order, strict=True):
        first = offsets[i][0]
        assert_bitwise_equal(out[at : at + length], together[first : first + length])
        alone = run(
            q[first : first + length],
            Paged(paged.keys, paged.values, paged.block_table[i : i + 1], *paged.scales),
            [(0, *chunks[i])],
        )
        assert_bitwise_equal(alone, together[first : first + length])


@pytest.mark.parametrize("cut", slow_after(2, [1, 63, 32, 64, 100]))
@pytest.mark.usefixtures("ordered_products")
def test_a_prompt_has_the_same_bits_wherever_it_is_cut(device, cut):
    paged = random_cache([150], 1, 32, 16, torch.float16, device)
    q = queries(150, 4, 32, torch.float16, device)
    whole = run(q, paged, [(0, 0, 150)])
    assert_bitwise_equal(run(q[:cut], paged, [(0, 0, cut)]), whole[:cut])
    assert_bitwise_equal(run(q[cut:], paged, [(0, cut, 150 - cut)]), whole[cut:])


def test_rows_may_share_the_blocks_of_a_prefix(device):
    paged = random_cache([70, 90, 64], 2, 32, 16, torch.float16, device, shared=[([0, 1, 2], 4)])
    chunks = [(0, 64, 6), (6, 64, 26)]
    q = queries(32, 4, 32, torch.float16, device)
    out = run(q, paged, chunks)
    expected = reference.prefill_attention(q, paged.keys, paged.values, chunks, paged.block_table[:2])
    assert_close(out, expected)


def test_the_plan_covers_every_pair_once_longest_first():
    table = torch.zeros(3, 8, dtype=torch.int32)
    plan = plan_prefill([(2, 0, 100), (102, 500, 70)], table, 180, 6, torch.float16)
    assert plan.chunks.tolist() == [[2, 0, 100], [102, 500, 70], [0, -2, 2], [172, -8, 8]]
    seen = sorted(
        (chunk, pair) for chunk, first in plan.tiles.tolist() for pair in range(first, first + plan.query_tile)
        if pair < plan.chunks[chunk, 2] * 6
    )  # fmt: skip
    assert seen == [(chunk, pair) for chunk in range(4) for pair in range(int(plan.chunks[chunk, 2]) * 6)]
    last = [min((first + plan.query_tile - 1) // 6, int(plan.chunks[c, 2]) - 1) + int(plan.chunks[c, 1])
            for c, first in plan.tiles.tolist()]  # fmt: skip
    assert last == sorted(last, reverse=True)


def test_e4m3_as_bits_equals_the_oracle(device):
    """The path of GPUs whose Triton has no e4m3."""
    with assume_gpu(A100):
        check([(0, 20), (60, 10)], 4, 2, 32, 16, FP8_PAIR, device)


def test_every_e4m3_bit_pattern_is_widened_exactly(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.empty(256, dtype=torch.float32, device=device)
    _widen_kernel[(1,)](codes, out)
    expected = codes.view(torch.float8_e4m3fn).float()
    number = ~expected.isnan()
    assert_bitwise_equal(out[number], expected[number])


@triton.jit
def _widen_kernel(codes_ptr, out_ptr):
    lane = tl.arange(0, 256)
    tl.store(out_ptr + lane, widen(tl.load(codes_ptr + lane), tl.float32))


@pytest.mark.parametrize("dim", [16, 80, 256])
def test_head_dims_that_do_not_fit_are_refused(device, dim):
    """With 256 a block of H100's would need more shared memory than there is."""
    with pytest.raises(AssertionError):
        check([(0, 3)], 2, 1, dim, 16, HALF_PAIR, device)


def test_the_operator_is_registered_whole(device):
    paged = random_cache([40, 3], 2, 32, 16, torch.float16, device)
    plan = plan_prefill([(0, 0, 40), (40, 0, 3)], paged.block_table, 43, 2, torch.float16)
    arguments = (queries(43, 4, 32, torch.float16, device), paged.keys, paged.values, *plan)
    torch.library.opcheck(prefill_attention.op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device):
    paged = random_cache([70, 90], 2, 128, 64, torch.bfloat16, device)
    q = queries(160, 8, 128, torch.bfloat16, device)
    expected = run(q, paged, [(0, 0, 70), (70, 0, 90)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = plan_prefill([(0, 0, 70), (70, 0, 90)], paged.block_table, 160, 4, q.dtype)
        out = prefill_attention(q, paged.keys, paged.values, *plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_bitwise_equal(out, expected)


ON_CARD = [(dtype, dtype) for dtype in (torch.bfloat16, torch.float16)] + [FP8_PAIR]


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", ON_CARD)
@pytest.mark.parametrize("cuts", [[1], [63], [64], [65], [1000], [100, 101, 700], [16, 256, 513, 1024]], ids=str)
def test_a_prompt_has_the_same_bits_on_a_card_wherever_it_is_cut(device, cuts, dtypes):
    query, stored = dtypes
    paged = random_cache([1100], 2, 128, 64, stored, device)
    q = queries(1100, 8, 128, query, device)
    whole = run(q, paged, [(0, 0, 1100)])
    for begin, end in pairwise([0, *cuts, 1100]):
        assert_bitwise_equal(run(q[begin:end], paged, [(0, begin, end - begin)]), whole[begin:end])


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(dtype, dtype) for dtype in DTYPES] + [FP8_PAIR])
def test_long_prompts(device, dtypes):
    query, stored = dtypes
    paged = random_cache([3000], 2, 128, 64, stored, device)
    q = queries(3000, 8, 128, query, device)
    out = run(q, paged, [(0, 0, 3000)])
    k = reference.paged_row(paged.keys, paged.block_table[0], 3000, paged.k_scale)
    v = reference.paged_row(paged.values, paged.block_table[0], 3000, paged.v_scale)
    heads = [x.transpose(0, 1)[None] for x in (q.float(), k.repeat_interleave(4, 1), v.repeat_interleave(4, 1))]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    assert_close(out, expected[0].transpose(0, 1))
