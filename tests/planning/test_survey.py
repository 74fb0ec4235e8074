"""What `batchmix plan` reckons, against brute force and hand-made figures."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.errors import BatchmixError
from batchmix.planning.cost import footprint, kv_bytes_per_token, parameters, weight_bytes
from batchmix.planning.estimate import Setting, Workload, estimate
from batchmix.planning.gpus import get_gpu
from batchmix.planning.survey import Survey
from batchmix.planning.table import MIXTRAL_8X7B
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3000), max_size=50), st.integers(1, 10))
def test_lengths_and_padding(lengths, batch):
    survey = Survey(batch)
    prompts = [Prompt(row, str(row), {}, [5] * length, SamplingConfig(n=2)) for row, length in enumerate(lengths)]
    assert list(survey.watch(prompts)) == prompts
    padded = sum(max(part) * len(part) for low in range(0, len(lengths), batch) if (part := lengths[low : low + batch]))
    assert survey.prompt_tokens == sum(lengths)
    assert survey.squared_tokens == sum(length**2 for length in lengths)
    assert survey.samples == 2 * len(lengths)
    assert survey.naive_padding == pytest.approx(1 - sum(lengths) / padded if padded else 0)
    if lengths:
        assert survey.percentile(1.0) == max(lengths)
        assert survey.percentile(0.5) == sorted(lengths)[(len(lengths) + 1) // 2 - 1]
        assert sum(int(line.split()[-1].replace(",", "")) for line in survey.histogram().splitlines()) == len(lengths)


def test_refused_rows_are_grouped_by_reason():
    survey = Survey(8)
    errors = ["prompt has 50 tokens; at most 9 fit", "prompt has 60 tokens; at most 9 fit", "messages is empty", None]
    rows = [Prompt(i, str(i), {}, [] if error else [1, 2], SamplingConfig(), error) for i, error in enumerate(errors)]
    list(survey.watch(rows))
    assert (survey.rows, survey.runnable) == (4, 1)
    assert [(reason.rows, reason.example_row) for reason in survey.refused.most_common()] == [(2, 0), (1, 2)]


def test_every_row_refused_for_a_reason_of_its_own():
    survey = Survey(8)
    errors = [f"column x holds {'x' * i}, which is no int64" for i in range(1200)]
    list(survey.watch(Prompt(i, str(i), {}, [], SamplingConfig(), error) for i, error in enumerate(errors)))
    assert len(survey.refused.most_common()) <= 1001
    assert sum(reason.rows for reason in survey.refused.most_common()) == survey.rows == 1200


def test_mixtral_8x7b_has_the_published_size():
    total, active = parameters(MIXTRAL_8X7B)
    tables = 2 * 32000 * 4096
    assert (total + tables) / 1e9 == pytest.approx(46.7, abs=0.05)  # the model card's 46.7B and 12.9B
    assert (active + tables) / 1e9 == pytest.approx(12.9, abs=0.05)
    assert weight_bytes(MIXTRAL_8X7B, 2) == 2 * (total + tables)
    assert kv_bytes_per_token(MIXTRAL_8X7B, 2) == 128 * 1024


def test_cost_grows_with_the_work_and_shrinks_with_the_card():
    def cost(gpu: str, rows: int):
        work = Workload(rows, rows * 500, rows * 250_000, rows, 200)
        setting = Setting(
            get_gpu(gpu), cards=1, share=0.9, host_bytes=0, has_disk=False, stream=False, max_model_len=4096,
            max_num_seqs=512, prefill_tokens=8192, workspace=lambda rows: 1e9,
        )  # fmt: skip
        return estimate(footprint(MIXTRAL_8X7B, 2), setting, work)

    assert cost("h200", 1000).gpus == 1
    assert cost("h100", 1000).gpus == 2
    assert cost("h200", 2000).hours == pytest.approx(2 * cost("h200", 1000).hours, rel=0.01)
    assert cost("l40s", 1000).prefill_seconds > cost("b200", 1000).prefill_seconds
    assert cost("h200", 1000).prefill_flops == pytest.approx(2 * 12.6e9 * 500_000, rel=0.03)


def test_unknown_gpu_names_the_nearest():
    with pytest.raises(BatchmixError, match="did you mean h200"):
        get_gpu("h20")
