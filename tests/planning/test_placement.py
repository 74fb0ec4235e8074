"""The cost model against figures made by hand, and that what it chooses fits."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchmix.dtypes import Quantization
from batchmix.offload.expert_stream import BUFFERS
from batchmix.planning.cost import footprint, weight_bytes
from batchmix.planning.gpus import get_gpu, known_gpu
from batchmix.planning.placement import DISK_BANDWIDTH, Machine, Rows, cards, select_placement
from batchmix.planning.step_cost import Step, measured_cost
from batchmix.planning.table import MIXTRAL_8X7B

BF16 = footprint(MIXTRAL_8X7B, 2)
ROWS = Rows(512, 256)
OPTIONS = {"longest": 4096, "prefill_tokens": 8192, "workspace": lambda rows: 1e9}
PCIE4 = Machine(device_bytes=22e9, host_bytes=200e9, link=25e9, hbm=600e9, flops=100e12)


def test_sizes_of_the_formats():
    experts = 8 * 3 * 4096 * 14336
    assert BF16.layer_bytes == 2 * experts
    assert BF16.fixed_bytes + 32 * BF16.layer_bytes == weight_bytes(MIXTRAL_8X7B, 2)
    assert footprint(MIXTRAL_8X7B, 2, Quantization.fp8).layer_bytes == experts + 4 * 8 * (2 * 14336 + 4096)
    assert footprint(MIXTRAL_8X7B, 2, Quantization.int4).layer_bytes == experts // 2 + 4 * experts // 128
    assert footprint(MIXTRAL_8X7B, 2, kv_itemsize=1).kv_bytes == 64 * 1024


def test_a_24_gb_card_waits_for_its_link():
    """By hand, of a placement: 2.82 GB of experts a layer and 128 KiB a token go over 25 GB/s."""
    placement = select_placement(BF16, PCIE4, ROWS, **OPTIONS)
    assert placement.bound == "link"
    assert placement.kv_on_host
    moved = placement.streamed * 2.818572e9 + placement.rows * 640 * 131072
    assert placement.step_seconds == pytest.approx(moved / 25e9, rel=1e-4)
    assert placement.tokens_per_second == pytest.approx(placement.rows * 25e9 / moved, rel=1e-4)
    on_device = select_placement(
        BF16, dataclasses.replace(PCIE4, host_bytes=85e9), ROWS, **{**OPTIONS, "longest": 2048}
    )
    assert not on_device.kv_on_host, "the host has no room for a cache"
    assert on_device.tokens_per_second < placement.tokens_per_second / 3


def test_what_fits_is_not_streamed():
    assert select_placement(BF16, cards(get_gpu("h200"), 1, 0.9, 2e12), ROWS, **OPTIONS).streamed == 0
    int4 = footprint(MIXTRAL_8X7B, 2, Quantization.int4)
    assert select_placement(int4, cards(get_gpu("l40s"), 1, 0.9, 2e12), ROWS, **OPTIONS).streamed == 0
    assert select_placement(BF16, PCIE4, ROWS, **OPTIONS, stream=False) is None


def test_steps_of_a_measured_card_are_sums_of_its_kernels_where_nothing_is_streamed():
    h200 = get_gpu("h200")
    found = select_placement(BF16, cards(h200, 1, 0.9, 2e12), ROWS, **OPTIONS)
    assert found.measured
    decode = Step(decode_rows=found.rows, context_tokens=found.rows * 640, logits_rows=found.rows)
    assert found.step_seconds == pytest.approx(measured_cost(BF16, h200).seconds(decode), rel=0.01)
    assert found.step_seconds < max(found.hbm_seconds, found.compute_seconds), "which assume 60 % of the data sheet"
    prefill = Step(prefill_tokens=8192, prefill_pairs=8192 * 256, logits_rows=16)
    assert found.prefill_seconds == pytest.approx(measured_cost(BF16, h200).seconds(prefill) / 16)
    assert not select_placement(BF16, cards(h200, 2, 0.9, 2e12), ROWS, **OPTIONS).measured, "no table has two cards"
    assert not select_placement(BF16, cards(h200, 1, 0.4, 2e12), ROWS, **OPTIONS).measured, (
        "no table has streamed weights"
    )
    int8 = footprint(MIXTRAL_8X7B, 2, Quantization.int8)
    found = select_placement(int8, cards(h200, 1, 0.9, 2e12), ROWS, **OPTIONS)
    assert not found.measured
    assert found.step_seconds == max(found.hbm_seconds, found.compute_seconds)


def test_what_the_host_has_no_room_for_comes_from_disk():
    short = dataclasses.replace(PCIE4, host_bytes=40e9)
    assert select_placement(BF16, short, ROWS, **OPTIONS) is None
    placement = select_placement(BF16, dataclasses.replace(short, has_disk=True), ROWS, **{**OPTIONS, "longest": 2048})
    moved = placement.streamed * BF16.layer_bytes
    assert placement.disk_bytes == pytest.approx(moved - 40e9)
    assert placement.link_seconds == pytest.approx(moved / 25e9 + placement.disk_bytes / DISK_BANDWIDTH)
    assert "GiB of it from disk" in placement.streamed_text(BF16)


@settings(max_examples=100, deadline=None)
@example(23999996928.0, 34700574720.0, Quantization.int4, False, 300, 1.0, 1481.03125)  # 207,624.4 tokens of cache
@given(
    st.floats(5e9, 120e9), st.floats(0, 300e9), st.sampled_from([None, *Quantization]), st.booleans(),
    st.sampled_from([None, 7, 300]), st.floats(1, 8000), st.floats(1, 2000),
)  # fmt: skip
def test_what_is_chosen_fits(device, host, quantization, disk, max_num_seqs, prompt, answer):
    model = footprint(MIXTRAL_8X7B, 2, quantization)
    machine = Machine(device, host, 25e9, 600e9, 100e12, disk)
    workspace = {limit: 1e9 + 4e5 * limit for limit in range(5000)}
    found = select_placement(model, machine, Rows(prompt, answer), longest=4096, prefill_tokens=8192,
                   workspace=workspace.__getitem__, max_num_seqs=max_num_seqs)  # fmt: skip
    if found is None:
        return
    buffers = min(BUFFERS, found.streamed) * model.layer_bytes
    resident = model.fixed_bytes + (model.layers - found.streamed) * model.layer_bytes + buffers
    cache = found.kv_tokens * model.kv_bytes
    on_host = found.streamed * model.layer_bytes
    staged = cache * 2 / model.layers if found.kv_on_host else cache
    assert resident + staged + workspace[found.max_num_seqs] <= device + 1
    assert on_host - found.disk_bytes + cache * found.kv_on_host <= host + 1
    assert disk or not found.disk_bytes
    assert found.kv_tokens >= 4096
    assert 1 <= found.rows <= found.max_num_seqs
    assert max_num_seqs in (None, found.max_num_seqs)
    assert found.rows == 1 or found.rows * (prompt + answer / 2) <= found.kv_tokens


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100_pcie"), ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"), ("NVIDIA L40", None),
        ("AMD Instinct MI300X", "mi300x"), ("NVIDIA B200", "b200"),
    ],
)  # fmt: skip
def test_cards_by_the_names_that_torch_gives_them(name, key):
    assert known_gpu(name) == (None if key is None else get_gpu(key))
