"""What runs in a step: tokens of running rows first, then prompt chunks up to a budget; and no schedule changes a bit."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from checkpoints import random_mixtral, save_hub
from engines import answers, load, make_engine, prompts, run
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.engine.cuda_graphs import cuda_capture
from batchmix.engine.scheduler import MIN_BUDGET, Scheduler
from batchmix.models.triton_ops import TritonOperators
from batchmix.records import Batch

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hub(random_mixtral(**SHAPE), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, max_model_len=3000)


def rows_of(count, prompt_tokens, max_tokens, **sampling):
    """Rows with equally long prompts that run to their limits, row i's `max_tokens(i)`."""
    source = random.Random(prompt_tokens)
    found = prompts(count, 64, temperature=1.0, ignore_eos=True, **sampling)
    return [
        replace(row, token_ids=[source.randrange(3, 64) for _ in range(prompt_tokens)],
                sampling=replace(row.sampling, max_tokens=max_tokens(row.row)))
        for row in found
    ]  # fmt: skip


def steps(engine, rows):
    """Of each step: rows that decode, and the tokens of its chunks."""
    found, original = [], engine.runner.run

    def watched(step):
        found.append((step.num_decode, [len(chunk.token_ids) for chunk in step.chunks]))
        original(step)

    engine.runner.run = watched
    list(engine.generate([Batch(rows)]))
    return found


def test_a_free_slot_is_filled_in_the_next_step_beside_the_rows_that_decode(model):
    rows = rows_of(4, 20, lambda row: [3, 6, 9, 9][row]) + [
        replace(row, id=f"late-{row.row}") for row in rows_of(1, 30, lambda row: 2)
    ]
    engine = make_engine(model, max_num_seqs=4)
    assert steps(engine, rows)[:5] == [(0, [20] * 4), (4, []), (4, []), (3, [30]), (4, [])]
    assert engine.stats.refills == 1


def test_chunks_fill_the_budget_and_no_more(model):
    """Prompts are cut at multiples of 512 alone, as the torch backend rounds other chunks otherwise."""
    rows = rows_of(8, 700, lambda row: 3)
    engine = make_engine(model, max_num_batched_tokens=1100, prefill_chunk=512, max_model_len=900)
    found = steps(engine, rows)
    assert [chunks for _, chunks in found if chunks][:3] == [[512, 188], [512, 188], [512, 188]]
    assert all(decoding + sum(chunks) <= 1100 for decoding, chunks in found)
    wide = steps(make_engine(model, max_num_batched_tokens=1500, prefill_chunk=512, max_model_len=900), rows)
    assert wide[0] == (0, [512, 188, 512, 188])


def test_a_backend_whose_prompts_may_be_cut_anywhere_fills_each_step_to_whole_blocks(folder):
    model = load(folder, max_model_len=200)
    model.ops = CutsAnywhere(model.ops)
    rows = rows_of(3, 50, lambda row: 2)
    engine = make_engine(model, max_num_batched_tokens=70, max_model_len=200)
    found = [chunks for _, chunks in steps(engine, rows) if chunks]
    assert found == [[50, 16], [34, 32], [18]]


class CutsAnywhere:
    cuts_prompts = True

    def __init__(self, operators):
        self._operators = operators

    def __getattr__(self, name):
        return getattr(self._operators, name)


def budget_of(engine: Scheduler, mean_answer: float, prompts_seen: int, prompt_tokens: int) -> int:
    engine.mean_answer, engine._prompts, engine._prompt_tokens = mean_answer, prompts_seen, prompts_seen * prompt_tokens
    return engine._budget(0.0)


def test_the_budget_keeps_the_batch_full(model):
    """R (1 + P / A) tokens with R rows, P prompt and A answer tokens; as many as may be while the batch is not full."""
    engine = make_engine(model, max_num_seqs=500, kv_blocks=3000, max_num_batched_tokens=8192, max_model_len=2000)
    scheduler = engine.scheduler
    assert budget_of(scheduler, 100.0, 1, 300) == 8192, "nothing runs"
    scheduler.running = [None] * 100  # type: ignore[list-item]
    held = 3001 * 16 / (300 + (100 + 16) / 2)
    assert budget_of(scheduler, 100.0, 1, 300) == MIN_BUDGET > held * 4
    held = 3001 * 16 / (40 + (10 + 16) / 2)
    assert budget_of(scheduler, 10.0, 1, 40) == (500 * 5) < held * 5, "as many rows as there are slots"
    scheduler.running = []


def test_a_batch_that_is_not_full_takes_as_many_prompts_as_a_step_may(model):
    engine = make_engine(model, max_num_seqs=64, max_num_batched_tokens=8192, prefill_chunk=512, max_model_len=900)
    found = steps(engine, rows_of(64, 150, lambda row: 30))
    assert found[0] == (0, [150] * 54)
    assert found[1][0] == 54
    assert found[1][1] == [150] * 6, "a step of 1,024 tokens, since the rows that wait are few"


def test_blocks_that_run_out_preempt_the_rows_that_started_last(model):
    rows = rows_of(12, 40, lambda row: 60)
    expected = answers(run(make_engine(model), rows))
    engine = make_engine(model, kv_blocks=40)
    assert answers(run(engine, rows)) == expected
    assert engine.stats.preempted > 0


def test_a_row_keeps_its_own_jump_forward_tokens_where_another_is_preempted(model):
    """What the preempted row was to get must not go to the other, which has blocks for its own alone."""
    engine = make_engine(model, kv_blocks=5, max_model_len=60, max_num_seqs=2)
    engine.scheduler._needed_tokens = lambda prompt, samples: 0.0  # type: ignore[method-assign]  # so that both start
    scheduler, batch = engine.scheduler, engine.scheduler.batch
    list(engine.enqueue(rows_of(2, 30, lambda row: 30)))
    engine.step()
    assert len(scheduler.running) == 2
    older = scheduler.running[0]
    assert not batch.pending
    step = scheduler.schedule([[1, 2, 3, 4], [5] * 12], 1)
    assert step is not None
    assert scheduler.running[0] is older
    assert step.num_decode == 1, "the other starts over"
    assert step.jump_forward == [[1, 2, 3, 4]]
    assert batch.planned[0] == 1 + 4


def test_samples_wait_for_slots_as_rows_do(model):
    rows = rows_of(6, 40, lambda row: 5 + 3 * row, n=4)
    expected = answers(run(make_engine(model), rows))
    for seqs in (5, 6):
        engine = make_engine(model, max_num_seqs=seqs)
        assert answers(run(engine, rows)) == expected
        assert engine.stats.refills > 0


class RandomSchedule:
    """Any budget, any number of decode steps, and preemptions that nothing asked for."""

    def __init__(self, scheduler: Scheduler, seed: int) -> None:
        self.source, self.scheduler = random.Random(seed), scheduler
        self.schedule = scheduler.schedule
        scheduler._budget = lambda free: self.source.choice([1, 20, 70, 200, 512])  # type: ignore[method-assign]
        scheduler.schedule = self  # type: ignore[method-assign,assignment]

    def __call__(self, jump_forward, num_steps):
        scheduler = self.scheduler
        if scheduler.running and not scheduler.batch.pending and not jump_forward and self.source.random() < 0.1:
            scheduler.preempt(self.source.randrange(len(scheduler.running)))
        return self.schedule(jump_forward, self.source.randint(1, num_steps))


MIXED = [
    {"temperature": 0.0}, {"temperature": 1.0, "n": 3}, {"temperature": 0.8, "top_p": 0.8, "logprobs": 2},
    {"temperature": 1.0, "presence_penalty": 0.4, "repetition_penalty": 1.2},
]  # fmt: skip


def mixed_rows(count, longest, seed):
    rows = prompts(count, 64, seed=seed, longest=longest, max_tokens=14)
    return [replace(row, sampling=replace(row.sampling, **MIXED[row.row % len(MIXED)])) for row in rows]


CHUNKED = {"prefill_chunk": 32, "max_model_len": 200}


@pytest.fixture(scope="module")
def mixed(model):
    """Rows, and their answers by the engine's own schedule."""
    rows = mixed_rows(14, 120, seed=1)
    return rows, answers(run(make_engine(model, **CHUNKED), rows))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 999), seqs=st.sampled_from([3, 8, 30]), blocks=st.sampled_from([30, 60, 2000]))
def test_any_schedule_gives_the_same_bits(model, mixed, seed, seqs, blocks):
    rows, expected = mixed
    engine = make_engine(model, max_num_seqs=seqs, kv_blocks=blocks, steps_per_read=3, **CHUNKED)
    RandomSchedule(engine.scheduler, seed)
    assert answers(run(engine, rows)) == expected


@pytest.mark.slow  # 30 s under the interpreter
@pytest.mark.parametrize("seed", range(2))
def test_any_schedule_gives_the_same_bits_on_the_triton_backend(tmp_path, seed):
    """Prompts cut anywhere, decoding rows beside them. float16, since numpy's sums of float32 depend on a row's place."""
    rows = mixed_rows(5, 40, seed=2)
    rows = [replace(row, sampling=replace(row.sampling, max_tokens=4)) for row in rows]
    folder = save_hub(random_mixtral(**SHAPE | {"head_dim": 32}), tmp_path)
    model = load(folder, torch.float16, operators=TritonOperators(batch_invariant=True))
    expected = answers(run(make_engine(model), rows))
    engine = make_engine(model, max_num_seqs=4)
    RandomSchedule(engine.scheduler, seed)
    assert answers(run(engine, rows)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_any_schedule_gives_the_same_bits_on_a_gpu(tmp_path, seed):
    """bfloat16 at head dimension 128, prompts cut anywhere, prefixes shared, captured steps between ragged ones."""
    shape = {**SHAPE, "hidden_size": 256, "head_dim": 128, "intermediate_size": 256}
    operators = TritonOperators(batch_invariant=True, share_prefix=True)
    model = load(save_hub(random_mixtral(**shape), tmp_path), torch.bfloat16, max_model_len=1200, operators=operators)
    rows = mixed_rows(40, 1000, seed=3)
    options = {"max_model_len": 1200, "block_size": 64, "kv_blocks": 800, "max_num_batched_tokens": 2048}
    expected = answers(run(make_engine(model, **options), rows))
    engine = make_engine(
        model, max_num_seqs=16, steps_per_read=2, capture=cuda_capture(), share_prefix=True, **options
    )  # fmt: skip
    RandomSchedule(engine.scheduler, seed)
    assert answers(run(engine, rows)) == expected
