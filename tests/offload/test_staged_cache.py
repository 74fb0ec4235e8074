"""A KV cache in host memory: the same bits as on the device, whose copies come as late as they may."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from checkpoints import random_mixtral, save_hub
from engines import LateAsyncCopy, ShortOfMemory, answers, load, make_engine, prompts, run
from hypothesis import given, settings
from hypothesis import strategies as st
from links import FakeLink

from batchmix.models.quantized import FP8
from batchmix.models.triton_ops import TritonOperators
from batchmix.offload import staged_cache
from batchmix.offload.expert_stream import Offload, spread
from batchmix.offload.staged_cache import _runs

LAYERS = 3  # odd, and few: what the last layers send back must be there before the next step reads it
SHAPE = {"num_hidden_layers": LAYERS, "vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "head_dim": 32,
         "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hub(random_mixtral(**SHAPE), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows():
    """Long prompts that are prefilled in chunks, short ones, and some with several samples, which copy a block."""
    drawn = prompts(7, 128, longest=60, temperature=1.0, max_tokens=9, logprobs=1, ignore_eos=True)
    return [replace(row, sampling=replace(row.sampling, n=1 + row.row % 3)) for row in drawn]


OPTIONS = {"block_size": 4, "max_model_len": 80, "prefill_chunk": 16, "max_num_batched_tokens": 48}


@pytest.fixture(scope="module")
def expected(folder, rows):
    return answers(run(make_engine(load(folder), **OPTIONS), rows))


@given(st.lists(st.integers(0, 40), max_size=20))
def test_runs_hold_every_block_and_few_others(blocks):
    runs = _runs(np.array(blocks, np.int64))
    held = [block for low, high in runs for block in range(low, high)]
    assert len(held) == len(set(held))
    assert set(blocks) <= set(held)
    for low, high in runs:
        inside = sorted(block for block in blocks if low <= block < high)
        assert (inside[0], inside[-1]) == (low, high - 1)
        assert max(np.diff(inside), default=1) <= staged_cache._GAP + 1


@pytest.mark.slow  # 5 s and more
@settings(max_examples=6, deadline=None)
@given(capacity=st.integers(1, 8), kv_blocks=st.integers(20, 60), streamed=st.integers(0, LAYERS))
def test_answers_are_those_of_a_cache_on_the_device(folder, rows, expected, capacity, kv_blocks, streamed):
    link = FakeLink()
    offload = Offload(link, spread(streamed, LAYERS)) if streamed else None
    engine = make_engine(load(folder, offload=offload), link, max_num_seqs=capacity, kv_blocks=kv_blocks, **OPTIONS)
    assert answers(run(engine, rows)) == expected


def test_rows_that_are_preempted(folder, rows, expected):
    engine = make_engine(load(folder), FakeLink(), max_num_seqs=8, kv_blocks=30, **OPTIONS)
    engine.scheduler.mean_answer = 1.0  # of earlier answers: no blocks are kept free for those that grow longer
    assert answers(run(engine, rows)) == expected
    assert engine.stats.preempted > 0


def test_rows_that_end_before_the_host_hears_of_it(folder):
    """Their next token is planned for, and goes to a block that others may get."""
    drawn = prompts(20, 128, longest=30, temperature=1.0, max_tokens=9, stop_token_ids=list(range(20)))
    expected = answers(run(make_engine(load(folder), **OPTIONS), drawn))
    assert {reason for _, reason, *_ in expected.values()} == {"stop", "length"}
    engine = make_engine(load(folder), FakeLink(), async_copy=LateAsyncCopy(), max_num_seqs=4, kv_blocks=30, **OPTIONS)
    assert answers(run(engine, drawn)) == expected


def test_a_cache_in_fp8(folder, rows):
    expected = run(make_engine(load(folder), kv_dtype=FP8, **OPTIONS), rows[:3])
    assert answers(run(make_engine(load(folder), FakeLink(), kv_dtype=FP8, **OPTIONS), rows[:3])) == answers(expected)


def test_out_of_memory_in_the_middle_of_a_step(folder, rows, expected):
    link = FakeLink()
    model = load(folder, offload=Offload(link, spread(2, LAYERS)))
    model.ops = ShortOfMemory("moe", {7, 30})
    engine = make_engine(model, link, max_num_seqs=8, kv_blocks=60, **OPTIONS)
    assert answers(run(engine, rows)) == expected
    assert engine.stats.out_of_memory == 2


@pytest.mark.parametrize("broken", ["wait", "finish"])
def test_what_is_not_waited_for_shows(folder, rows, expected, monkeypatch, broken):
    """That the tests above can fail."""
    link = FakeLink()
    monkeypatch.setattr(link, broken, lambda handle: None)
    assert answers(run(make_engine(load(folder), link, **OPTIONS), rows)) != expected


@pytest.mark.slow  # 10 s under the interpreter
def test_the_triton_backend(folder):
    header = [3 + i % 90 for i in range(12)]
    drawn = prompts(4, 128, longest=8, temperature=1.0, max_tokens=4, logprobs=1)
    drawn = [replace(row, token_ids=header + list(row.token_ids), sampling=replace(row.sampling, n=1 + row.row % 2))
             for row in drawn]  # fmt: skip
    options = {"max_num_seqs": 3, "kv_blocks": 40, "block_size": 4, "max_model_len": 32, "prefill_chunk": 8,
               "share_prefix": True}  # fmt: skip
    expected = run(make_engine(load(folder, operators=TritonOperators(share_prefix=True)), **options), drawn)
    link = FakeLink()
    model = load(folder, operators=TritonOperators(share_prefix=True), offload=Offload(link, spread(2, LAYERS)))
    engine = make_engine(model, link, **options)
    assert answers(run(engine, drawn)) == answers(expected)
    assert engine.stats.shared_tokens > 0
