"""Rows that begin alike: what they share is computed once, and no answer changes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from checkpoints import random_mixtral, save_hub
from engines import load, make_engine, prompts, run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(save_hub(random_mixtral(), tmp_path_factory.mktemp("model")))


def with_headers(rows, lengths):
    """Each row behind one of the headers, in turn."""
    source = random.Random(3)
    headers = [[source.randrange(3, 512) for _ in range(length)] for length in lengths]
    return [replace(row, token_ids=headers[i % len(headers)] + list(row.token_ids)) for i, row in enumerate(rows)]


def tokens(completions):
    return {key: (list(c.token_ids), c.finish_reason, c.num_tokens) for key, c in completions.items()}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "n": 2}], ids=["greedy", "sampled"])
def test_answers_stay_the_same_and_the_prefix_is_computed_once(model, sampling):
    rows = with_headers(prompts(40, 512, seed=1, longest=30, **sampling), [100])
    plain = make_engine(model, max_num_seqs=80)  # so that samples of a prompt start together
    expected = tokens(run(plain, rows))
    sharing = make_engine(model, max_num_seqs=80, share_prefix=True)
    assert tokens(run(sharing, [replace(row) for row in rows])) == expected
    assert plain.stats.shared_tokens == 0
    assert sharing.stats.shared_tokens >= 39 * 96, "6 blocks of 16 for every row but the first"
    assert sharing.stats.prompt_tokens + sharing.stats.shared_tokens == plain.stats.prompt_tokens


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({"max_num_seqs": 7}, [50, 80, 33]),  # refilled slots find what earlier rows left
        ({"prefill_chunk": 64, "max_num_batched_tokens": 64}, [150, 20]),  # a prefix longer than a prefill step
        ({"kv_blocks": 40, "max_model_len": 400}, [64, 200]),  # rows are put back, and prefixes make room
        ({"kv_blocks": 26, "max_model_len": 400}, [90, 130, 170, 210]),  # no room for all prefixes at once
    ],
)
def test_refill_preemption_and_eviction_change_no_answer(model, options, lengths):
    rows = with_headers(prompts(20, 512, seed=2, longest=20, max_tokens=40), lengths)
    rows = [replace(row, sampling=replace(row.sampling, max_tokens=10 + row.row * 7 % 31)) for row in rows]
    expected = tokens(run(make_engine(model, max_model_len=400), rows))
    for order in (rows, random.Random(4).sample(rows, len(rows))):
        engine = make_engine(model, share_prefix=True, **options)
        engine.scheduler.mean_answer = 1.0  # of earlier answers: no blocks are kept free for those that grow longer
        assert tokens(run(engine, [replace(row) for row in order], sort_window=11)) == expected
        assert engine.stats.shared_tokens > 0
        assert engine.stats.refills > 0 or "max_num_seqs" not in options
        assert (engine.stats.preempted > 0) == ("kv_blocks" in options)


def test_rows_with_nothing_in_common_are_not_remembered(model):
    engine = make_engine(model, share_prefix=True)
    run(engine, prompts(20, 512, seed=5))
    assert len(engine.scheduler.prefixes) == 0
    assert engine.stats.shared_tokens == 0
