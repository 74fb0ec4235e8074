"""What a step costs: the measured points come out, more work never takes less, and cards without a table have a roofline."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from batchmix.planning.cost import footprint
from batchmix.planning.gpus import get_gpu
from batchmix.planning.step_cost import MeasuredCost, RooflineCost, Step, measured_cost, step_cost
from batchmix.planning.table import MIXTRAL_8X7B, MIXTRAL_8X22B

BF16 = footprint(MIXTRAL_8X7B, 2)
COSTS = {"measured": step_cost(BF16, get_gpu("h200")), "roofline": step_cost(BF16, get_gpu("h100"))}
DECODE = Step(decode_rows=400, context_tokens=400 * 300, logits_rows=400)
MIXED = replace(DECODE, prefill_tokens=1600, prefill_pairs=1600 * 100, logits_rows=408)


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("name", [field.name for field in fields(Step)])
def test_more_work_never_takes_less(cost, name):
    times = [cost.seconds(replace(MIXED, **{name: amount})) for amount in [*range(1, 6000, 97), 10**9]]
    assert times == sorted(times)
    assert times[-1] > times[0]


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_padding_costs_less_than_rows(cost):
    step = replace(DECODE, decode_rows=3000, logits_rows=3000)
    padded = cost.seconds(replace(step, padding_rows=256))
    assert cost.seconds(step) < padded < cost.seconds(replace(step, decode_rows=3256, logits_rows=3256))


@pytest.mark.parametrize(
    ("tokens", "us"),
    [
        (256, 700),  # benchmark kernels, with routing
        (7859, 2 * 4381),  # profiled prefill: two launches
        (16384, 18000 - 730),  # benchmark kernels, less what routing, sorting and combining take
    ],
)
def test_experts_take_what_was_measured(tokens, us):
    assert measured_cost(BF16, get_gpu("h200")).experts_us(tokens) == pytest.approx(us, rel=0.11)


def test_a_profiled_prefill_is_reproduced():
    """125,746 tokens in 16 steps through 8 layers took 1,324 ms on the device."""
    eight = footprint(replace(MIXTRAL_8X7B, num_hidden_layers=8), 2)
    tokens = 125746 / 16
    step = Step(prefill_tokens=tokens, prefill_pairs=tokens * 104, logits_rows=600 / 16)
    assert 16 * measured_cost(eight, get_gpu("h200")).seconds(step) == pytest.approx(1.324, rel=0.02)


def test_few_tokens_read_few_experts():
    cost = measured_cost(BF16, get_gpu("h200"))
    read = 8 * (446 + 224) / 8
    assert cost.experts_us(0) == 0
    assert cost.experts_us(1) == pytest.approx(read * 2 / 8)
    assert cost.experts_us(4) == pytest.approx(read * (1 - 0.75**4))


def test_steps_without_a_table_take_their_bytes_or_their_operations():
    cost = step_cost(BF16, get_gpu("h100"), efficiency=0.5)
    assert isinstance(cost, RooflineCost)
    few, many = Step(decode_rows=1, context_tokens=10, logits_rows=1), Step(prefill_tokens=8192)
    assert cost.seconds(few) == pytest.approx((BF16.weight_bytes + 10 * 131072) / (0.5 * 3350e9))
    assert cost.seconds(many) == pytest.approx(8192 * BF16.token_flops / (0.5 * 989e12))
    dense = BF16.token_flops - BF16.expert_flops
    assert dense == 2 * 32 * (4096 * 128 * 80 + 4096 * 8)
    padded = Step(prefill_tokens=8192, padding_rows=100)
    more = cost.compute_seconds(padded) - cost.compute_seconds(many)
    assert more == pytest.approx(100 * (dense + BF16.head_flops) / (0.5 * 989e12))


def test_a_table_is_of_one_card_one_shape_and_one_dtype():
    assert isinstance(step_cost(BF16, get_gpu("h200")), MeasuredCost)
    others = [footprint(MIXTRAL_8X22B, 2), footprint(MIXTRAL_8X7B, 4), footprint(MIXTRAL_8X7B, 2, kv_itemsize=1)]
    for model in others:
        assert isinstance(step_cost(model, get_gpu("h200")), RooflineCost)
    assert measured_cost(footprint(replace(MIXTRAL_8X7B, num_hidden_layers=5), 2), get_gpu("h200")) is not None
