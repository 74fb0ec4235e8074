"""When waiting prompts start: as soon as waiting has cost as much as a prefill step that is not full would."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from checkpoints import random_mixtral, save_hub
from engines import answers, load, make_engine, prompts, run

from batchmix.plan.cost import FULL_PRODUCT, full_step
from batchmix.records import Batch

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(save_hub(random_mixtral(**SHAPE), tmp_path_factory.mktemp("model")), max_model_len=1200)


def rows_of(count, prompt_tokens, max_tokens, **sampling):
    """Rows with equally long prompts that run to their limits, row i's `max_tokens(i)`."""
    source = random.Random(prompt_tokens)
    found = prompts(count, 64, temperature=1.0, ignore_eos=True, **sampling)
    return [
        replace(row, token_ids=[source.randrange(3, 64) for _ in range(prompt_tokens)],
                sampling=replace(row.sampling, max_tokens=max_tokens(row.row)))
        for row in found
    ]  # fmt: skip


def events(engine, rows):
    """How many rows each prefill started, and how many decode steps ran between them."""
    found = []
    prefill, decode = engine.prefill.run, engine.decode.run

    def watched_prefill():
        found.append(("prefill", sum(len(admission.samples) for admission in engine.state.admissions)))
        prefill()

    def watched_decode():
        if found[-1][0] == "prefill":
            found.append(("decode", 0))
        found[-1] = "decode", found[-1][1] + 1
        decode()

    engine.prefill.run, engine.decode.run = watched_prefill, watched_decode
    list(engine.generate([Batch(rows)]))
    return found


def test_a_full_step_has_as_many_tokens_for_each_expert_as_hide_the_reading_of_its_weights(model):
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (8, 2)
    assert full_step(model.config) == 4 * FULL_PRODUCT == 1024


def test_enough_tokens_start_at_once(model):
    """Two rows of four end first; each leaves a slot for a prompt of 1,024 tokens, all that a prefill step needs."""
    rows = rows_of(4, 20, lambda row: [5, 8, 30, 30][row]) + [
        replace(row, id=f"late-{row.row}") for row in rows_of(2, 1024, lambda row: 2)
    ]
    engine = make_engine(model, max_num_seqs=4, max_model_len=1100)
    assert events(engine, rows)[:5] == [("prefill", 4), ("decode", 4), ("prefill", 1), ("decode", 1), ("prefill", 1)]
    assert engine.stats.refills == 2


@pytest.mark.parametrize(("prompt_tokens", "steps"), [(512, 2), (256, 3), (64, 4)])
def test_few_tokens_start_once_the_free_slot_has_cost_as_much(model, prompt_tokens, steps):
    """One row of four ends: a quarter of a reading is lost in each step, until 1 - tokens / 1024 is."""
    rows = rows_of(4, 20, lambda row: [3, 40, 40, 40][row]) + [
        replace(row, id=f"late-{row.row}") for row in rows_of(1, prompt_tokens, lambda row: 2)
    ]
    engine = make_engine(model, max_num_seqs=4, max_model_len=600, max_num_batched_tokens=2048)
    assert events(engine, rows)[:3] == [("prefill", 4), ("decode", 2 + steps), ("prefill", 1)]


def test_blocks_that_run_out_before_slots_do_not_make_every_prompt_a_step_of_its_own(model):
    """Of 60 slots a quarter can be used. Rows that end one by one are refilled several at a time."""
    rows = rows_of(60, 60, lambda row: 20 + row % 20)
    engine = make_engine(model, max_num_seqs=60, kv_blocks=100)
    started = [count for name, count in events(engine, rows) if name == "prefill"]
    assert sum(started) == 60 + engine.stats.preempted
    assert max(started) < 20
    assert 60 / len(started) > 2


def test_samples_wait_for_slots_as_rows_do(model):
    rows = rows_of(6, 40, lambda row: 10 + 7 * row, n=4)
    expected = answers(run(make_engine(model), rows))
    for seqs in (5, 6):
        engine = make_engine(model, max_num_seqs=seqs)
        assert answers(run(engine, rows)) == expected
        assert engine.stats.refills > 0
