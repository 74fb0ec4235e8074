"""The engine against transformers.generate, and against itself in other company."""

from __future__ import annotations

import random

import pytest
import torch
from checkpoints import random_mixtral, save_fused, save_hub, save_mistral
from engines import answers, load, make_engine, prompts, run

from batchmix.config import SamplingConfig
from batchmix.records import Prompt

SAMPLED = {"temperature": 1.0, "logprobs": 2, "max_tokens": 20}


@pytest.fixture(scope="module")
def reference():
    return random_mixtral()


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    return load(save_hub(reference, tmp_path_factory.mktemp("model")))


def greedy(reference, token_ids, max_tokens):
    """transformers' answer, without the end-of-sequence token."""
    ids = torch.tensor([list(token_ids)])
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )
    return [token for token in out[0, ids.shape[1] :].tolist() if token != 2]


@pytest.mark.parametrize("save", [save_hub, save_fused, save_mistral])
def test_greedy_tokens_equal_transformers_on_200_ragged_prompts(reference, tmp_path, save):
    model = load(save(reference, tmp_path))
    rows = prompts(200, 512, seed=1, longest=60, max_tokens=8)
    found = run(make_engine(model), rows)
    if save is save_hub:
        expected = [greedy(reference, row.token_ids, 8) for row in rows]
        greedy_cache.update({row.id: tokens for row, tokens in zip(rows, expected, strict=True)})
    for row in rows:
        assert list(found[row.id, 0].token_ids) == greedy_cache[row.id]


greedy_cache: dict[str, list[int]] = {}  # transformers' answers, the same for every layout


@pytest.mark.parametrize("sampling", [{"logprobs": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_answers_do_not_depend_on_company(model, sampling):
    rows = prompts(60, 512, seed=2, **sampling)
    expected = answers(run(make_engine(model, prefill_chunk=64), rows))
    assert len({str(answer) for answer in expected.values()}) > 50, "the answers must differ for this to say anything"
    shuffled = random.Random(5).sample(rows, len(rows))
    for seqs, batched, blocks, order, window in [
        (1, 512, 2000, rows, 1000),
        (7, 512, 2000, rows, 10),
        (64, 2048, 2000, shuffled, 1000),
        (16, 64, 2000, rows, 1),
        (32, 512, 60, shuffled, 1000),  # too few blocks: rows are put back and start again
    ]:
        engine = make_engine(
            model, max_num_seqs=seqs, max_num_batched_tokens=batched, kv_blocks=blocks, prefill_chunk=64
        )
        assert answers(run(engine, order, window)) == expected
    alone = run(make_engine(model, prefill_chunk=64), rows[7:8])
    assert answers(alone) == {key: expected[key] for key in alone}


def test_too_few_blocks_put_rows_back(model):
    rows = prompts(20, 512, seed=4, longest=20, max_tokens=120, ignore_eos=True)
    engine = make_engine(model, kv_blocks=40)
    put_back = []
    original = engine._put_back
    engine._put_back = lambda slot: (put_back.append(slot), original(slot))[1]  # type: ignore[method-assign]
    found = run(engine, rows)
    assert put_back, "the test must run out of blocks"
    assert answers(found) == answers(run(make_engine(model), rows))
    assert engine.stats.completion_tokens == sum(completion.num_tokens for completion in found.values())


def test_samples_share_a_prompt_and_equal_separate_runs(model):
    rows = prompts(10, 512, seed=6, temperature=1.0, n=5)
    found = run(make_engine(model, max_num_seqs=8), rows)
    assert len(found) == 50
    assert answers(found) == answers(run(make_engine(model, max_num_seqs=64), rows))
    first = prompts(10, 512, seed=6, temperature=1.0, n=1)
    single = answers(run(make_engine(model), first))
    assert single == {key: value for key, value in answers(found).items() if key[1] == 0}
    assert any(found["row-1", 0].token_ids != found["row-1", i].token_ids for i in range(1, 5))


def test_chunked_prefill_of_a_long_prompt(model, reference):
    rows = prompts(3, 512, seed=8, longest=400)
    engine = make_engine(model, prefill_chunk=64)
    found = run(engine, rows)
    for row in rows:
        assert list(found[row.id, 0].token_ids) == greedy(reference, row.token_ids, 12)


def test_bfloat16_runs_and_does_not_depend_on_company(reference, tmp_path):
    model = load(save_hub(reference, tmp_path), torch.bfloat16)
    rows = prompts(24, 512, seed=9, **SAMPLED)
    expected = answers(run(make_engine(model), rows))
    assert answers(run(make_engine(model, max_num_seqs=5, kv_blocks=80), rows)) == expected


def test_length_limits(model):
    rows = prompts(4, 512, seed=10, max_tokens=500, ignore_eos=True, longest=50)
    for row in rows:
        found = run(make_engine(model, max_model_len=128), [row])[row.id, 0]
        assert found.finish_reason == "length"
        assert len(row.token_ids) + found.num_tokens == 128


def test_error_prompts_come_through(model):
    bad = Prompt(5, "bad", {}, [], SamplingConfig(), error="too long")
    found = run(make_engine(model), [*prompts(3, 512), bad])
    assert found["bad", 0].finish_reason == "error"
    assert found["bad", 0].error == "too long"
    assert len(found) == 4


def test_should_stop_ends_early(model):
    steps = iter(range(1000))
    engine = make_engine(model, should_stop=lambda: next(steps) > 20, max_num_seqs=2)
    from batchmix.plan.planner import Limits, plan

    found = list(engine.generate(plan(prompts(50, 512), Limits(2, 100, 16, 100))))
    assert 0 < len(found) < 50


def test_a_row_longer_than_the_cache_is_a_mistake_of_the_caller(model):
    with pytest.raises(ValueError, match="cannot hold one row"):
        make_engine(model, kv_blocks=3, max_model_len=512)


def test_no_end_of_sequence_token(model, reference):
    rows = prompts(5, 512, seed=11)
    found = run(make_engine(model, eos_token_ids=()), rows)
    assert all(completion.finish_reason == "length" for completion in found.values())
