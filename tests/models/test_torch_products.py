"""Products whose rows keep their bits, and the check of a machine where they do not."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from engines import threads
from torch import Tensor

from batchmix.models import torch_products
from batchmix.models.torch_products import FIXED_ROWS, hold_bits, one_call, pad_rows, prepack, product

Product = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _nothing_is_fixed(monkeypatch):
    monkeypatch.setattr(torch_products, "_fixed", set())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "out"), [(64, 128), (96, 40), (600, 32), (512, 8), (4096, 96)])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_bits_do_not_depend_on_company(width, out, count):
    x, weight = normal(528, width), normal(out, width, seed=1)
    with threads(count):
        hold_bits({"weight": ((out, width, torch.float32), 528)})
        expected = product(x[:16], weight)
        for rows in (32, 80, 112, 336, 528):
            moved = torch.cat((x[16:rows], x[:16]))
            assert torch.equal(product(x[:rows], weight)[:16], expected), rows
            assert torch.equal(product(moved, weight)[-16:], expected), rows


@pytest.mark.parametrize("width", [128, 896, 1408])
def test_bfloat16_bits_do_not_depend_on_company(width):
    """With AMX oneDNN's own do, at a width of 896 for 44 of 128 numbers of rows."""
    x, weight = normal(128, width).bfloat16(), normal(64, width, seed=1).bfloat16()
    x[:, width // 2 :], weight[:, width // 2 :] = x[:, : width // 2].flip(1), -weight[:, : width // 2].flip(1)
    fixed, unsteady = hold_bits({"weight": ((64, width, torch.bfloat16), 512)})
    assert not unsteady
    assert not fixed or torch.cpu.get_capabilities().get("avx512_bf16"), "today's speed is kept elsewhere"
    expected = product(x[:16], weight)
    for rows in range(16, 513, 16):
        among = x[torch.arange(rows) % 128]
        assert torch.equal(product(among, weight)[:16], expected), rows


@pytest.mark.parametrize(("width", "out"), [(256, 1792), (896, 256), (64, 100), (40, 7)])
def test_a_prepacked_weight_gives_the_same_bits(width, out):
    x, weight = normal(528, width), normal(out, width, seed=1)
    packed = prepack(weight)
    assert packed.is_mkldnn == (torch_products._ONEDNN and torch_products._onednn_keeps_bits())
    assert (packed.shape, packed.dtype, packed.nbytes) == (weight.shape, weight.dtype, weight.nbytes)
    for count in (1, 2):
        with threads(count):
            for rows in (16, 32, 80, 112, 336, 528):
                assert torch.equal(product(x[:rows], packed), product(x[:rows], weight)), (count, rows)


def test_a_prepacked_weight_of_bfloat16_is_multiplied_right():
    """With AVX2 there is no layout of its own for it; elsewhere the bits may be others."""
    x, weight = normal(48, 256).bfloat16(), normal(64, 256, seed=1).bfloat16()
    exact = x.double() @ weight.double().T
    assert torch.allclose(product(x, prepack(weight)).double(), exact, rtol=1e-2, atol=0.1)


def test_where_onednn_is_not_used_a_weight_stays_as_it_is(monkeypatch):
    weight = normal(32, 64)
    monkeypatch.setattr(torch_products, "_onednn_keeps_bits", lambda: False)
    torch_products._packs.cache_clear()
    assert prepack(weight) is weight
    monkeypatch.undo()
    torch_products._packs.cache_clear()


def by_halves(x: Tensor, weight: Tensor) -> Tensor:
    """The sum is cut in two where there are more than 32 rows, in float32 inside."""
    if len(x) <= 32:
        return one_call(x, weight)
    half, weight = x.shape[1] // 2, weight.to_dense()
    parts = [F.linear(x[:, part].float(), weight[:, part].float()) for part in (slice(half), slice(half, None))]
    return (parts[0] + parts[1]).to(x.dtype)


def flipping(x: Tensor, weight: Tensor) -> Tensor:
    """The lowest bit of one column in 50 is another for numbers of rows that are no multiple of 48."""
    found = one_call(x, weight)
    if len(x) % 48:
        bits = found.view(torch.int16 if found.dtype is torch.bfloat16 else torch.int32)
        bits[:, ::50] ^= 1
    return found


def reversing_for(counts: set[int]) -> Product:
    """The sum runs backwards for some numbers of rows."""

    def found(x: Tensor, weight: Tensor) -> Tensor:
        return one_call(x.flip(1), weight.to_dense().flip(1)) if len(x) in counts else one_call(x, weight)

    return found


SOME_COUNTS = [set(random.Random(seed).sample(range(16, 2049, 16), 44)) for seed in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [by_halves, flipping, *map(reversing_for, SOME_COUNTS)])
def test_products_that_depend_on_the_number_of_rows_run_in_fixed_calls(monkeypatch, dtype, broken):
    calls = []

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(len(x))
        return broken(x, weight)

    monkeypatch.setattr(torch_products, "one_call", watched)
    shape = 40, 896, dtype
    assert hold_bits({"w2": (shape, 2048)}) == (["w2"], [])
    assert hold_bits({"w2": (shape, 2048)}) == (["w2"], []), "a second engine of the process"
    x, weight = normal(336, 896).to(dtype), normal(40, 896, seed=1).to(dtype)
    calls.clear()
    expected = product(x, weight)
    assert calls == [FIXED_ROWS] * 6
    for rows in (16, 48, 64, 80, 320):
        assert torch.equal(product(x[:rows], weight), expected[:rows])
        assert torch.equal(product(x[-rows:], weight), expected[-rows:])
    other = weight[:32]
    calls.clear()
    product(x, other)
    assert calls == [336], "shapes that were not found to depend on it keep their speed"


def test_a_weight_is_checked_in_the_layout_in_which_it_is_multiplied(monkeypatch):
    """A library that fails prepacked weights alone: those of quantised experts, which are none, keep their speed."""

    def failing(x: Tensor, weight: Tensor) -> Tensor:
        return by_halves(x, weight) if weight.is_mkldnn else one_call(x, weight)

    if not torch_products._packs(torch.float32):
        pytest.skip("there is no such layout here")
    shapes = {"w2": ((40, 896, torch.float32), 512)}
    monkeypatch.setattr(torch_products, "one_call", failing)
    assert hold_bits(shapes, unpacked=["w2"]) == ([], [])
    assert hold_bits(shapes) == (["w2"], [])


def test_bits_do_not_depend_on_the_largest_batch_that_was_checked(monkeypatch):
    """Up to 32 rows all is well: a run with so few must give the bits of one with many, which takes fixed calls."""
    monkeypatch.setattr(torch_products, "one_call", by_halves)
    assert hold_bits({"w2": ((40, 96, torch.bfloat16), 32)}) == (["w2"], [])


def test_products_that_fixed_calls_do_not_hold_are_named(monkeypatch):
    def by_place(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat((one_call(x[:16], weight), one_call(x[16:].flip(1), weight.to_dense().flip(1))))

    monkeypatch.setattr(torch_products, "one_call", by_place)
    shapes = {"wo": ((32, 96, torch.float32), 512), "w2": ((40, 896, torch.bfloat16), 512)}
    assert hold_bits(shapes) == ([], ["wo", "w2"])


def test_what_is_tried_is_bounded_and_spans_what_a_run_has(monkeypatch):
    for shape, largest in [((256, 128), 8192), ((32000, 4096), 256), ((28672, 4096), 512), ((6144, 4096), 8192)]:
        counts = list(torch_products._row_counts((*shape, torch.float32), largest))
        assert len(set(counts)) == len(counts)
        assert {16, 32, 48, 80} <= set(counts)
        assert min(largest, 2048) <= max(counts) <= largest
        assert sum(counts) * 2 * shape[0] * shape[1] < 2e11
    assert list(torch_products._row_counts((8, 8, torch.float32), 10)) == [16]


def test_rows_are_padded_to_whole_tiles():
    assert [pad_rows(rows) for rows in (1, 15, 16, 17, 32)] == [16, 16, 16, 32, 32]
    with pytest.raises(AssertionError):
        product(torch.zeros(17, 4), torch.zeros(3, 4))


def test_a_onednn_that_rounds_by_the_number_of_rows_is_not_used(monkeypatch):
    """As that of torch 2.11 does with AVX2."""
    x, weight = normal(32, 64), normal(96, 64, seed=1)
    assert not torch_products._ONEDNN or torch_products._onednn_keeps_bits() or torch.__version__ < "2.13"
    monkeypatch.setattr(torch_products, "_onednn", lambda x, weight: F.linear(x, weight) + len(x))
    torch_products._onednn_keeps_bits.cache_clear()
    assert torch.equal(torch_products.one_call(x, weight), F.linear(x, weight))
    monkeypatch.undo()
    torch_products._onednn_keeps_bits.cache_clear()
