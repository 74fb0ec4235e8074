from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, FP8, HALF_DTYPES, assert_bitwise_equal, assert_close, poison, poisoned_allocations
from ordered_products import ordered_products  # noqa: F401
from slow_cases import slow_after
from torch import Tensor

from batchmix.kernels import moe, reference
from batchmix.kernels.gpu import current_gpu
from batchmix.kernels.tiles import Tile, format_of, heuristic, select_tile
from batchmix.models import torch_ops

few = settings(max_examples=8, deadline=None)
FORMATS = ["fp8", "fp8_block", "int8", "int4"]


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal, and scaled so that products along the last dimension have size 1."""
    source = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=source) * shape[-1] ** -0.5).to(device, dtype)


def layer(
    experts: int, hidden: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    router = random(experts, hidden, dtype=torch.float32, device=device) * 3
    w13 = random(experts, 2 * width, hidden, dtype=dtype, device=device)
    return router, w13, random(experts, hidden, width, dtype=dtype, device=device, seed=1)


def tokens(count: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return random(count, hidden, dtype=dtype, device=device, seed=2) * hidden**0.5


def routing(counts: list[int], top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """order and offsets for `counts` pairs of each expert, in a mixed order."""
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int()
    experts = experts[torch.randperm(len(experts), generator=torch.Generator().manual_seed(0))]
    order, offsets = reference.sort_pairs(experts.view(-1, top_k), len(counts))
    return order.to(device), offsets.to(device)


# Tokens in an expert: one in all, all in one, none in the first or last, tiles that are full, one over and one under.
COUNTS = [[0, 2, 0, 0], [60, 0, 0], [0, 16, 1, 17, 0], [15, 33, 2]]


@few
@given(
    st.integers(1, 70), st.integers(1, 12), st.integers(1, 3), st.integers(1, 200), st.sampled_from(DTYPES), st.data()
)
def test_route(count: int, experts: int, top_k: int, hidden: int, dtype: torch.dtype, data: Any) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    top_k = min(top_k, experts)
    x, router = tokens(count, hidden, dtype, device), random(experts, hidden, dtype=torch.float32, device=device)
    with poisoned_allocations():
        weights, chosen = moe.route(x, router, top_k)
    expected_weights, expected = reference.route(x, router, top_k)
    assert torch.equal(chosen, expected)
    assert_close(weights, expected_weights, 1e-5)


def test_equal_experts_are_chosen_from_the_lowest_on(device: torch.device) -> None:
    x = tokens(5, 64, torch.float32, device)
    router = random(2, 64, dtype=torch.float32, device=device).repeat(4, 1)  # experts 0 2 4 6 and 1 3 5 7 are equal
    _, chosen = moe.route(x, router, 3)
    assert all(row in ([0, 2, 4], [1, 3, 5]) for row in chosen.tolist())
    _, chosen = moe.route(torch.zeros_like(x), router, 2)
    assert chosen.tolist() == [[0, 1]] * 5


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of infinities, in numpy
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_token_leaves_the_others_alone(bad: float, device: torch.device) -> None:
    router, w13, w2 = layer(5, 64, 32, torch.float32, device)
    x = tokens(20, 64, torch.float32, device)
    good = moe.moe(x, router, w13, w2, 2, batch_invariant=True)
    x[7, 3] = bad
    _, chosen = moe.route(x, router, 2)
    assert chosen.min() >= 0
    assert chosen.max() < 5
    out = moe.moe(x, router, w13, w2, 2, batch_invariant=True)
    others = torch.arange(20, device=device) != 7
    assert_bitwise_equal(out[others], good[others])


@few
@given(st.integers(1, 3), st.integers(1, 9), st.lists(st.integers(0, 8), min_size=1, max_size=1500))
def test_sort_pairs(top_k: int, num_experts: int, chosen: list[int]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = (chosen * top_k)[: len(chosen) // top_k * top_k or top_k]
    experts = torch.tensor([expert % num_experts for expert in chosen], dtype=torch.int32).view(-1, top_k)
    with poisoned_allocations():
        order, offsets = moe.sort_pairs(experts.to(device), num_experts, None, None)
    expected_order, expected_offsets = reference.sort_pairs(experts, num_experts)
    assert_bitwise_equal(order.cpu(), expected_order)
    assert_bitwise_equal(offsets.cpu(), expected_offsets)


@pytest.mark.parametrize("pairs", [1023, 1024, 1025, 4099])
def test_sort_pairs_over_several_programs(pairs: int, device: torch.device) -> None:
    experts = torch.randint(8, (pairs, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    order, offsets = moe.sort_pairs(experts.to(device), 8, None, None)
    expected_order, expected_offsets = reference.sort_pairs(experts, 8)
    assert_bitwise_equal(order.cpu(), expected_order)
    assert_bitwise_equal(offsets.cpu(), expected_offsets)


@pytest.mark.parametrize("valid", [0, 1, 600, 2050, 9999])
def test_sort_pairs_leaves_padding_out_and_counts_the_rest(valid: int, device: torch.device) -> None:
    experts = torch.randint(5, (2050, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    routed = experts.clone()
    routed[valid:] = 2**30  # what lies in memory that routing left as it was
    counts = torch.full((5,), 2**40, dtype=torch.int64, device=device)
    num_valid = torch.tensor([valid], dtype=torch.int32, device=device)
    order, offsets = moe.sort_pairs(routed.to(device), 5, counts, num_valid)
    expected_order, expected_offsets = reference.sort_pairs(experts[:valid], 5)
    assert_bitwise_equal(order[: len(expected_order)].cpu(), expected_order)
    assert_bitwise_equal(offsets.cpu(), expected_offsets)
    assert (counts - 2**40).tolist() == torch.bincount(experts[:valid].flatten(), minlength=5).tolist()


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize(
    ("format", "count", "valid"),
    [
        ("dense", 150, 0),
        *(pytest.param("dense", 150, n, marks=pytest.mark.slow) for n in (3, 120)),
        ("fp8", 20, 3),
        pytest.param("int4", 20, 3, marks=pytest.mark.slow),
    ],
)  # 150: enough for x to be permuted
def test_padding_reaches_no_expert(format: str, count: int, valid: int, device: torch.device) -> None:
    """Tokens have the bits that they have without padding, which itself gets the residual alone."""
    router, w13, w2 = layer(3, 128, 128, torch.float16, device)
    options: dict[str, Any] = {"batch_invariant": True}
    if format != "dense":
        w13, options["w13_scale"], _ = quantised(format, w13)
        w2, options["w2_scale"], _ = quantised(format, w2)
    x = tokens(count, 128, torch.float16, device)
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    num_valid = torch.tensor([valid], dtype=torch.int32, device=device)
    with poisoned_allocations():
        alone = moe.moe(x[:valid], router, w13, w2, 2, residual=x[:valid], **options)
        padded = moe.moe(x, router, w13, w2, 2, residual=x, counts=counts, num_valid=num_valid, **options)
        summed = moe.moe(x, router, w13, w2, 2, num_valid=num_valid, **options)
    assert_bitwise_equal(padded[:valid], alone)
    assert_bitwise_equal(padded[valid:], x[valid:])
    assert not summed[valid:].any()
    assert counts.sum() == 2 * valid


def tiles(kind: str, format: str, device: torch.device) -> list[Tile]:
    """All that this GPU would use, and those that use what others have: descriptors, permuted rows, pointers."""
    gpu = current_gpu(device)
    found = {heuristic(kind, format, rows, gpu) for rows in (1, 32, 64, 128, 1024)}
    found |= {replace(tile, tma=False, permute=False, swap_ab=not tile.swap_ab) for tile in found if tile.permute}
    return sorted(found, key=str)


@pytest.mark.parametrize("counts", slow_after(1, COUNTS), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_up_and_down_in_all_tiles(counts: list[int], dtype: torch.dtype, device: torch.device) -> None:
    hidden, width, top_k = 80, 48, 2  # no multiple of a tile
    pairs = sum(counts)
    order, offsets = routing(counts, top_k if pairs % top_k == 0 else 1, device)
    top_k = top_k if pairs % top_k == 0 else 1
    _, w13, w2 = layer(len(counts), hidden, width, dtype, device)
    x, h = tokens(pairs // top_k, hidden, dtype, device), tokens(pairs, width, dtype, device)
    weights = torch.rand(pairs, generator=torch.Generator().manual_seed(0)).to(device)
    up = reference.experts_up(x, w13, order, offsets, top_k)
    down = reference.experts_down(h, w2, order, offsets, weights)
    for tile in tiles("up", format_of(dtype), device):
        out = torch.empty(pairs, width, dtype=dtype, device=device)
        poison(out)
        moe.launch_experts(x, None, w13, None, order, offsets, None, out, top_k, tile)
        assert_close(out, up)
    for tile in tiles("down", format_of(dtype), device):
        out = torch.empty(pairs, hidden, dtype=dtype, device=device)
        poison(out)
        moe.launch_experts(h, None, w2, None, order, offsets, weights, out, 1, tile)
        assert_close(out, down)


def quantised(format: str, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of w [.., N, K], and what they stand for, in float32: quantize.py's formats, in a hurry."""
    rows, columns = {"fp8_block": (128, 128), "int4": (1, 128)}.get(format, (1, w.shape[-1]))
    limit = {"int8": 127.0, "int4": 7.0}.get(format, 448.0)
    shape = (*w.shape[:-2], -(-w.shape[-2] // rows), rows, -(-w.shape[-1] // columns), columns)
    whole = (*w.shape[:-2], shape[-4] * rows, shape[-2] * columns)
    padded = torch.zeros(whole, device=w.device)
    padded[..., : w.shape[-2], : w.shape[-1]] = w
    scale = padded.view(shape).abs().amax((-3, -1)) / limit  # [.., N / rows, K / columns]
    spread = scale.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., : w.shape[-2], : w.shape[-1]]
    codes = w.float() / spread
    codes = codes.round() if format.startswith("int") else codes.to(FP8)
    values = codes.float() * spread
    if format == "int4":
        groups = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2, 64))
        return (groups[..., 0, :] + 16 * groups[..., 1, :]).flatten(-2), scale, values
    codes = codes.to(torch.int8) if format == "int8" else codes
    return codes, scale if format == "fp8_block" else scale[..., 0], values


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.usefixtures("ordered_products")  # under the interpreter, also the faster of two products of fp8
@pytest.mark.parametrize("counts", COUNTS[2:3], ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_up_and_down(format: str, dtype: torch.dtype, counts: list[int], device: torch.device) -> None:
    hidden, width = (128, 256) if format == "int4" else (160, 80) if format == "fp8_block" else (96, 80)
    pairs = sum(counts)
    order, offsets = routing(counts, 1, device)
    _, w13, w2 = layer(len(counts), hidden, width, torch.float32, device)
    w13, w13_scale, w13_values = quantised(format, w13)
    w2, w2_scale, w2_values = quantised(format, w2)
    x, h = tokens(pairs, hidden, dtype, device), tokens(pairs, width, dtype, device)
    weights = torch.rand(pairs, generator=torch.Generator().manual_seed(0)).to(device)
    x_scale, x_values, h_scale, h_values = None, x, None, h
    if format.startswith("fp8"):
        x, x_scale, x_values = quantised("fp8", x)
        h, h_scale, h_values = quantised("fp8", h)
    up = reference.experts_up(x_values, w13_values, order, offsets, 1)
    down = reference.experts_down(h_values, w2_values, order, offsets, weights)
    for tile in tiles("up", format, device):
        out = torch.empty(pairs, width, dtype=dtype, device=device)
        poison(out)
        moe.launch_experts(x, x_scale, w13, w13_scale, order, offsets, None, out, 1, tile)
        assert_close(out, up)
    for tile in tiles("down", format, device):
        out = torch.empty(pairs, hidden, dtype=dtype, device=device)
        poison(out)
        moe.launch_experts(h, h_scale, w2, w2_scale, order, offsets, weights, out, 1, tile)
        assert_close(out, down)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_every_code_of_the_integer_formats_is_exact(dtype: torch.dtype, device: torch.device) -> None:
    order, offsets = routing([16], 1, device)
    h = torch.zeros(16, 256, dtype=dtype, device=device)
    h[:, 0] = 1.0  # picks the first code of a row
    h[1, 0], h[1, 64] = 0.0, 1.0  # and in one the first high nibble
    weights, out = torch.ones(16, device=device), torch.empty(16, 256, dtype=dtype, device=device)
    codes = torch.zeros(1, 256, 256, dtype=torch.int8, device=device)
    codes[0, :, 0] = torch.arange(-128, 128)
    tile = select_tile("down", "int8", 256, 256, 16, current_gpu(device))
    moe.launch_experts(h, None, codes, torch.ones(1, 256, device=device), order, offsets, weights, out, 1, tile)
    assert torch.equal(out[0].cpu().float(), torch.arange(-128.0, 128.0))
    packed = torch.full((1, 256, 128), 0x88, dtype=torch.uint8, device=device)
    packed[0, :, 0] = torch.arange(256)
    tile = select_tile("down", "int4", 256, 256, 16, current_gpu(device))
    moe.launch_experts(h, None, packed, torch.ones(1, 256, 2, device=device), order, offsets, weights, out, 1, tile)
    row_of_pair = order.tolist()
    low, high = out[row_of_pair[0]].cpu().float(), out[row_of_pair[1]].cpu().float()
    assert torch.equal(low, torch.arange(256.0) % 16 - 8)
    assert torch.equal(high, torch.arange(256.0) // 16 - 8)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine(dtype: torch.dtype, residual: bool, device: torch.device) -> None:
    y = tokens(15, 1100, dtype, device)
    added = tokens(5, 1100, dtype, device) if residual else None
    with poisoned_allocations():
        out = moe.combine(y, 3, added)
    assert_bitwise_equal(out, reference.combine(y, 3, added))


@few
@given(
    st.integers(1, 40),
    st.integers(2, 9),
    st.integers(1, 2),
    st.sampled_from([24, 64, 72]),
    st.sampled_from([16, 40, 64]),
    st.sampled_from(DTYPES),
)
def test_moe(count: int, experts: int, top_k: int, hidden: int, width: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    router, w13, w2 = layer(experts, hidden, width, dtype, device)
    x = tokens(count, hidden, dtype, device)
    with poisoned_allocations():
        out = moe.moe(x, router, w13, w2, top_k)
    assert_close(out, reference.moe(x.float(), router, w13.float(), w2.float(), top_k))


def test_moe_is_the_torch_backends(device: torch.device) -> None:
    router, w13, w2 = layer(8, 96, 160, torch.float32, device)
    x = tokens(48, 96, torch.float32, device)
    expected = torch_ops.moe(*(tensor.cpu() for tensor in (x, router, w13, w2)), 2)  # that backend is for CPUs alone
    assert_close(moe.moe(x, router, w13, w2, 2), expected)
    assert_close(moe.moe(x, router, w13, w2, 2, residual=x), x.cpu() + expected)


@pytest.mark.parametrize("format", ["dense", *FORMATS])
def test_no_tokens(format: str, device: torch.device) -> None:
    router, w13, w2 = layer(4, 128, 128, torch.float16, device)
    scales = {}
    if format != "dense":
        w13, scales["w13_scale"], _ = quantised(format, w13)
        w2, scales["w2_scale"], _ = quantised(format, w2)
    x = tokens(0, 128, torch.float16, device)
    with poisoned_allocations():
        assert moe.moe(x, router, w13, w2, 2, **scales).shape == (0, 128)
        order, offsets = moe.sort_pairs(torch.empty(0, 2, dtype=torch.int32, device=device), 4, None, None)
    assert order.tolist() == []
    assert offsets.tolist() == [0] * 5


def test_rows_that_lie_apart_are_refused(device: torch.device) -> None:
    """They would be read at the wrong places."""
    router, w13, w2 = layer(4, 64, 32, torch.float32, device)
    x = tokens(5, 128, torch.float32, device)[:, :64]
    order, offsets = routing([2, 3], 1, device)
    calls = [
        lambda: moe.route(x, router, 2),
        lambda: moe.experts_up(x, None, w13, None, order, offsets, 1, x.dtype),
        lambda: moe.experts_down(x[:, :32], None, w2, None, order, offsets, torch.ones(5, device=device), x.dtype),
        lambda: moe.combine(x, 1),
        lambda: moe.sort_pairs(torch.zeros(2, 4, dtype=torch.int32, device=device).T, 4, None, None),
    ]
    for call in calls:
        with pytest.raises(AssertionError):
            call()


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize("format", slow_after(2, FORMATS))
def test_quantised_moe(format: str, device: torch.device) -> None:
    router, w13, w2 = layer(4, 128, 128, torch.float32, device)
    x = tokens(21, 128, torch.float16, device)
    w13, w13_scale, w13_values = quantised(format, w13)
    w2, w2_scale, w2_values = quantised(format, w2)
    with poisoned_allocations():
        out = moe.moe(x, router, w13, w2, 2, w13_scale=w13_scale, w2_scale=w2_scale)
    # For fp8 the oracle leaves x and h as they are: what remains is the error of two quantisations to 4 bits of mantissa.
    expected = reference.moe(x.float(), router, w13_values, w2_values, 2)
    assert_close(out, expected, 5e-2 if format.startswith("fp8") else None)


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize("format", ["dense", *FORMATS])
def test_a_row_has_the_same_bits_in_any_company(format: str, device: torch.device) -> None:
    dtype = DTYPES[-1]
    router, w13, w2 = layer(4, 128, 128, dtype, device)
    scales = {}
    if format != "dense":
        w13, scales["w13_scale"], _ = quantised(format, w13)
        w2, scales["w2_scale"], _ = quantised(format, w2)
    x = tokens(24, 128, dtype, device)

    def run(rows: Tensor) -> Tensor:
        return moe.moe(rows, router, w13, w2, 2, batch_invariant=True, **scales)

    together = run(x)
    assert_bitwise_equal(run(x), together)
    for rows in (slice(23, 24), slice(3, 14)):
        assert_bitwise_equal(run(x[rows]), together[rows])
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0)).to(device)
    assert_bitwise_equal(run(x[shuffled]), together[shuffled])


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["float16", "bfloat16", *FORMATS])
def test_tiles_of_every_size_give_the_same_bits(format: str, device: torch.device) -> None:
    """What makes batch invariance free; where it fails on a GPU, only `batch_invariant` holds there."""
    dtype = torch.float16 if format == "float16" else torch.bfloat16
    router, w13, w2 = layer(8, 1024, 1408, dtype, device)
    scales = {}
    if format in FORMATS:
        w13, scales["w13_scale"], _ = quantised(format, w13)
        w2, scales["w2_scale"], _ = quantised(format, w2)
    x = tokens(4096, 1024, dtype, device)
    together = moe.moe(x, router, w13, w2, 2, **scales)
    for count in (1, 60, 250, 500, 1000):
        assert_bitwise_equal(moe.moe(x[:count], router, w13, w2, 2, **scales), together[:count])


@pytest.mark.gpu
def test_a_graph_replays_with_other_tokens(device: torch.device) -> None:
    router, w13, w2 = layer(8, 256, 512, torch.bfloat16, device)
    x = tokens(300, 256, torch.bfloat16, device)
    first = x[:100].clone()
    moe.moe(first, router, w13, w2, 2)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe.moe(first, router, w13, w2, 2)
    for rows in (x[100:200], x[200:]):
        first.copy_(rows)
        graph.replay()
        assert_bitwise_equal(out, moe.moe(rows.clone(), router, w13, w2, 2))


def test_operators_are_registered_as_they_are(device: torch.device) -> None:
    router, w13, w2 = layer(3, 32, 32, torch.float32, device)
    x = tokens(4, 32, torch.float32, device)
    weights, experts = moe.route(x, router, 2)
    order, offsets = moe.sort_pairs(experts, 3, None, None)
    h = moe.experts_up(x, None, w13, None, order, offsets, 2, torch.float32)
    y = moe.experts_down(h, None, w2, None, order, offsets, weights.view(-1), torch.float32)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (moe.route, (x, router, 2)),
        (moe.sort_pairs, (experts, 3, None, None)),
        (moe.sort_pairs, (experts, 3, experts.new_zeros(3, dtype=torch.int64), experts.new_ones(1))),
        (moe.experts_up, (x, None, w13, None, order, offsets, 2, torch.float32)),
        (moe.experts_down, (h, None, w2, None, order, offsets, weights.view(-1), torch.float32)),
        (moe.combine, (y, 2, x)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.op, arguments, test_utils=("test_schema", "test_faketensor"))
