from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, assert_bitwise_equal, assert_close, poisoned_allocations
from ordered_products import ordered_products  # noqa: F401
from paged import FP8_PAIR, HALF_PAIR, Paged, random_cache
from torch import Tensor

from batchmix.kernels import reference
from batchmix.kernels.attention_decode import decode_attention, plan_decode
from batchmix.kernels.gpu import A100, H100, assume_gpu
from batchmix.kernels.shared_splits import SPLIT, SharedSplits, find_shared_splits


def queries(rows: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    return torch.randn(rows, heads, dim, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def sharing(q: Tensor, paged: Paged, context: list[int], capacity: int | None = None) -> SharedSplits:
    size, ratio = paged.keys.shape[2], q.shape[1] // paged.keys.shape[1]
    return find_shared_splits(paged.block_table.cpu(), torch.tensor(context), size, ratio, capacity).to(q.device)


def run(q: Tensor, paged: Paged, context: list[int], shared: SharedSplits | None = None) -> Tensor:
    size, ratio = paged.keys.shape[2], q.shape[1] // paged.keys.shape[1]
    plan = plan_decode(paged.block_table, torch.tensor(context, device=q.device), size, ratio, shared)
    with poisoned_allocations():
        return decode_attention(q, paged.keys, paged.values, *plan, *paged.scales)


def oracle(q: Tensor, paged: Paged, context: list[int]) -> Tensor:
    return reference.decode_attention(
        q, paged.keys, paged.values, paged.block_table, torch.tensor(context), *paged.scales
    )


def check(context, heads, kv_heads, dim, size, dtypes, device, seed=0) -> None:
    """The kernel equals the oracle, twice with the same bits."""
    query, stored = dtypes
    paged = random_cache(context, kv_heads, dim, size, stored, device, seed)
    q = queries(len(context), heads, dim, query, device, seed)
    out = run(q, paged, context)
    assert_close(out, oracle(q, paged, context))
    assert_bitwise_equal(run(q, paged, context), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "context",
    [
        [1],
        [16, 17, 1],  # at a block's edge and past it
        [64, 65, 63],  # a key tile's
        [SPLIT, SPLIT + 1, SPLIT - 1],
        [0, 5, 0, 0],  # padding rows give zeros
        pytest.param([9 * SPLIT + 3, 2], marks=pytest.mark.slow),  # more splits than are merged at once
    ],
)
def test_rows_equal_the_oracle(device, context, dtype):
    check(context, 4, 2, 32, 16, (dtype, dtype), device)


@pytest.mark.parametrize("size", [16, 32, 48, 64, 128])
def test_block_sizes(device, size):
    check([size, size + 1, 1, 3 * size - 1, SPLIT + size], 2, 1, 32, size, HALF_PAIR, device)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 1), (12, 2), (5, 1), (40, 1)])
def test_ratios_of_heads(device, heads, kv_heads):
    check([40, 7], heads, kv_heads, 32, 16, HALF_PAIR, device)


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF_PAIR, FP8_PAIR, (torch.float32, FP8_PAIR[1])])
def test_head_dims_and_caches(device, dim, dtypes):
    check([70, 12], 4, 2, dim, 16, dtypes, device)


@pytest.mark.slow  # seconds under the interpreter, or of processes
@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(0, SPLIT + 90), min_size=1, max_size=4),
    st.sampled_from([(2, 1), (2, 2), (6, 2)]),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([HALF_PAIR, FP8_PAIR, *((dtype, dtype) for dtype in DTYPES)]),
    st.integers(0, 2**31),
)
def test_any_step_equals_the_oracle(device, context, heads, size, dtypes, seed):
    check(context, *heads, 32, size, dtypes, device, seed=seed)


def test_no_rows(device):
    paged = random_cache([], 2, 32, 16, torch.float16, device)
    assert run(queries(0, 4, 32, torch.float16, device), paged, []).shape == (0, 4, 32)


def test_queries_may_be_a_slice_of_qkv(device):
    paged = random_cache([30, 40], 2, 32, 16, torch.float16, device)
    qkv = queries(2, 8, 32, torch.float16, device)
    assert_bitwise_equal(run(qkv[:, :4], paged, [30, 40]), run(qkv[:, :4].contiguous(), paged, [30, 40]))


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize("dtypes", [HALF_PAIR, FP8_PAIR])
def test_a_row_has_the_same_bits_alone_in_company_and_in_other_blocks(device, dtypes):
    query, stored = dtypes
    context = [300, 1, 0, 64, 2 * SPLIT, 77]
    paged = random_cache(context, 2, 32, 16, stored, device)
    q = queries(len(context), 4, 32, query, device)
    together = run(q, paged, context)
    assert_bitwise_equal(run(q, paged.moved(3), context), together)
    order = [3, 0, 5, 4, 2, 1]
    swapped = Paged(paged.keys, paged.values, paged.block_table[order], *paged.scales)
    assert_bitwise_equal(run(q[order], swapped, [context[i] for i in order]), together[order])
    for i, length in enumerate(context):
        alone = Paged(paged.keys, paged.values, paged.block_table[i : i + 1, : max(1, -(-length // 16))], *paged.scales)
        assert_bitwise_equal(run(q[i : i + 1], alone, [length]), together[i : i + 1])


PREFIXES = [  # lengths of the rows, and (rows, tokens) that have these leading tokens in common
    ([SPLIT + 1, SPLIT + 40, 300], [([0, 1, 2], SPLIT)]),
    ([SPLIT, SPLIT, 20], [([0, 1], SPLIT)]),  # nothing of their own
    ([600, 600, 600, 700], [([0, 1, 2, 3], 2 * SPLIT + 64)]),  # the rest of the prefix is the rows' own
    ([300, 600, 300, 0, 700], [([0, 2], SPLIT), ([1, 4], 2 * SPLIT)]),  # two prefixes, rows not side by side
    ([600, 600, 300, 300], [([0, 1, 2, 3], SPLIT), ([0, 1], 2 * SPLIT)]),  # a prefix and a longer one
    ([260] * 18, [(list(range(18)), SPLIT)]),  # more rows than one tile takes
]


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize("dtypes", [HALF_PAIR, FP8_PAIR])
@pytest.mark.parametrize(
    ("context", "prefixes"), [*PREFIXES[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in PREFIXES[2:])]
)
def test_sharing_a_prefix_changes_no_bit(device, context, prefixes, dtypes):
    query, stored = dtypes
    heads = 6 if len(context) < 10 else 2  # 6: a tile of (row, head) pairs is not full
    paged = random_cache(context, 1, 64, 16, stored, device, shared=[(rows, t // 16) for rows, t in prefixes])
    q = queries(len(context), heads, 64, query, device)
    shared = sharing(q, paged, context)
    assert len(shared.rows) > 0
    out = run(q, paged, context, shared)
    assert_bitwise_equal(out, run(q, paged, context))
    assert_bitwise_equal(out, run(q, paged, context, sharing(q, paged, context, capacity=len(shared.rows) + 3)))
    assert_bitwise_equal(out, run(q, paged, context, sharing(q, paged, context, capacity=1)))


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), HALF_PAIR, FP8_PAIR])
@pytest.mark.parametrize(("context", "prefixes"), PREFIXES[2:4])
def test_a_shared_prefix_equals_the_oracle(device, context, prefixes, dtypes):
    query, stored = dtypes
    paged = random_cache(context, 2, 64, 32, stored, device, shared=[(rows, t // 32) for rows, t in prefixes])
    q = queries(len(context), 8, 64, query, device)
    out = run(q, paged, context, sharing(q, paged, context))
    assert_close(out, oracle(q, paged, context))
    assert_bitwise_equal(run(q, paged, context, sharing(q, paged, context)), out)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5 * SPLIT), st.integers(0, 3)), min_size=1, max_size=9),
    st.sampled_from([16, 48, 128]),
)
def test_the_plan_lists_every_split_that_is_not_shared_once(rows, size):
    context = torch.tensor([length for length, _ in rows])
    first = torch.minimum(torch.tensor([own for _, own in rows]), context // SPLIT).int()
    table = torch.zeros(len(rows), -(-5 * SPLIT // size), dtype=torch.int32)
    nothing = torch.empty(0, 8, dtype=torch.int32)
    plan = plan_decode(table, context, size, 4, SharedSplits(nothing, nothing[:, 0], first))
    listed = [tuple(item) for item in plan.items[: int(plan.num_items)].tolist()]
    assert listed == [
        (row, split)
        for row, (length, _) in enumerate(rows)
        for split in range(int(first[row]), -(-length // SPLIT))
    ]  # fmt: skip


def test_e4m3_as_bits_gives_the_same_bits(device):
    """The path of GPUs whose Triton has no e4m3."""
    context = [70, 5]
    paged = random_cache(context, 2, 32, 16, FP8_PAIR[1], device)
    q = queries(2, 4, 32, FP8_PAIR[0], device)
    with assume_gpu(H100):
        native = run(q, paged, context)
    with assume_gpu(A100):
        assert_bitwise_equal(run(q, paged, context), native)


def test_the_operator_is_registered_whole(device):
    paged = random_cache([40, 3], 2, 32, 16, torch.float16, device)
    plan = plan_decode(paged.block_table, torch.tensor([40, 3], device=device), 16, 2)
    arguments = (queries(2, 4, 32, torch.float16, device), paged.keys, paged.values, *plan)
    torch.library.opcheck(decode_attention.op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_context_on_the_device(device):
    context = [300, 700, 64]
    paged = random_cache([length + 300 for length in context], 2, 128, 64, torch.bfloat16, device)
    q = queries(3, 8, 128, torch.bfloat16, device)
    lengths = torch.tensor(context, device=device)

    def step() -> Tensor:
        plan = plan_decode(paged.block_table, lengths, 64, 4)
        return decode_attention(q, paged.keys, paged.values, *plan)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for grown in (0, 1, 299):
        lengths.copy_(torch.tensor(context, device=device) + grown)
        graph.replay()
        assert_bitwise_equal(out, run(q, paged, [length + grown for length in context]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(dtype, dtype) for dtype in (torch.bfloat16, torch.float16)] + [FP8_PAIR])
@pytest.mark.parametrize("heads", [8, 12])  # 4 and 6 a kv head: 8x7B's and 8x22B's
@pytest.mark.parametrize(("context", "prefixes"), PREFIXES)
def test_sharing_a_prefix_changes_no_bit_on_a_card(device, context, prefixes, heads, dtypes):
    query, stored = dtypes
    paged = random_cache(context, 2, 128, 64, stored, device, shared=[(rows, t // 64) for rows, t in prefixes])
    q = queries(len(context), heads, 128, query, device)
    shared = sharing(q, paged, context)
    assert len(shared.rows) > 0
    assert_bitwise_equal(run(q, paged, context, shared), run(q, paged, context))


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(dtype, dtype) for dtype in DTYPES] + [FP8_PAIR])
def test_many_rows_with_a_shared_prefix(device, dtypes):
    query, stored = dtypes
    context = [1024 + 37 * i % 400 for i in range(64)]
    paged = random_cache(context, 2, 128, 64, stored, device, shared=[(list(range(64)), 16)])
    q = queries(64, 8, 128, query, device)
    out = run(q, paged, context, sharing(q, paged, context))
    assert_close(out[::9], oracle(q, paged, context)[::9])
    assert_bitwise_equal(out, run(q, paged, context))
