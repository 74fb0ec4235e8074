"""Results that are looked at one window late: the host never reads what has not arrived, and no answer changes."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from checkpoints import random_mixtral, save_hub
from engines import LateAsyncCopy, answers, load, make_engine, prompts, run
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_cases import slow_after

from batchmix.kernels.row_state import Finish
from batchmix.models import torch_backend
from batchmix.models.kv_cache import SCRATCH_BLOCK
from batchmix.models.mixtral import Mixtral
from batchmix.planning.planner import Limits, plan
from batchmix.prompts.stop_strings import build_stop_table

V = 64
SHAPE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip
PIECES = [b"", b"", b""] + [bytes([97 + i % 7]) for i in range(V - 3)]
KINDS = [
    {"max_tokens": 1},
    {"max_tokens": 85, "ignore_eos": True},
    {"top_p": 0.9, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"stop": ["ab", "cde", "ff"], "max_tokens": 40},
    {"stop_token_ids": [5, 6, 7, 8], "min_tokens": 2},
    {"n": 3, "logit_bias": {9: 2.0}},
]
HOST_READS = ("numpy", "item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")


class Device:
    """The torch backend, which is the device here: only inside its operators may rows' tensors be looked at.

    A row that runs has a block to write to in every step, and a step may run out of memory.
    """

    def __init__(self, out_of_memory: set[int]) -> None:
        self.working, self.steps, self.out_of_memory = False, 0, out_of_memory

    @contextmanager
    def work(self):
        before, self.working = self.working, True
        yield
        self.working = before

    def __getattr__(self, name):
        found = getattr(torch_backend, name)
        if not callable(found):
            return found

        def operator(*arguments, **options):
            with self.work():
                result = found(*arguments, **options)
            if not callable(result):
                return result
            if name == "attend" and arguments[2].decode is not None:
                self.check_blocks(arguments[1], arguments[2].decode)
            self.steps += 1
            if self.steps in self.out_of_memory:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.attending(result)

        return operator

    def attending(self, attend):
        def run(*arguments):
            with self.work():
                return attend(*arguments)

        return run

    def check_blocks(self, cache, decode):
        with self.work():
            running = torch.nonzero(decode.running[: len(decode.host_positions)])[:, 0]
            blocks = decode.block_table[running, decode.positions[running] // cache.block_size]
            assert (blocks != SCRATCH_BLOCK).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(save_hub(random_mixtral(**SHAPE), tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def rows():
    found = prompts(18, V, seed=1, longest=30, temperature=1.0)
    return [replace(row, sampling=replace(row.sampling, **KINDS[row.row % len(KINDS)])) for row in found]


@pytest.fixture(scope="module")
def expected(model, rows):
    return answers(run(engine(model), rows))


def engine(model, **options):
    def stop_table(sampling):
        return build_stop_table(sampling.stop or [], PIECES, drops_leading_space=False)

    defaults = {"block_size": 4, "kv_blocks": 300, "max_model_len": 120, "stop_table": stop_table, "prefill_chunk": 16}
    return make_engine(model, **{**defaults, **options})


def late_engine(model, out_of_memory=frozenset(), **options):
    device = Device(set(out_of_memory))
    on_device = Mixtral(model.config, model.weights, device, 512)
    made = engine(on_device, async_copy=LateAsyncCopy(), **options)
    return made, device


@contextmanager
def guarded(made, device):
    """Fails where the host looks at a tensor of the slots."""
    with pytest.MonkeyPatch.context() as patch:
        for name in HOST_READS:
            original = getattr(torch.Tensor, name)

            def read(tensor, *arguments, original=original, name=name, **options):
                slots = made.scheduler.batch
                if not device.working:
                    mine = [field for field in vars(slots).values() if isinstance(field, torch.Tensor)]
                    with device.work():
                        places = {field.untyped_storage().data_ptr() for field in mine}
                        assert tensor.untyped_storage().data_ptr() not in places, f"the host calls Tensor.{name}"
                return original(tensor, *arguments, **options)

            patch.setattr(torch.Tensor, name, read)
        yield


def test_the_guard_finds_a_host_that_looks(model, rows):
    made, device = late_engine(model)
    with guarded(made, device), pytest.raises(AssertionError, match="the host calls"):
        made.scheduler.batch.finish.tolist()


def assert_late_looks_change_no_answer(model, rows, expected, seed, out_of_memory, **options):
    made, device = late_engine(model, out_of_memory, **options)
    order = random.Random(seed).sample(rows, len(rows))
    with guarded(made, device):
        assert answers(run(made, order, sort_window=7)) == expected
    assert made.stats.completion_tokens == sum(answer[3] for answer in expected.values()), "each token counts once"
    return made.stats


@pytest.mark.parametrize(
    ("steps", "seqs", "blocks", "out_of_memory"), slow_after(1, [(4, 24, 60, {40}), (1, 7, 300, {5})], unpack=True)
)
def test_late_looks_change_no_answer(model, rows, expected, steps, seqs, blocks, out_of_memory):
    """Refilled slots, rows put back, samples, steps out of memory, rows that end early, in one step or at their limit."""
    stats = assert_late_looks_change_no_answer(
        model, rows, expected, steps, out_of_memory, steps_per_read=steps, max_num_seqs=seqs, kv_blocks=blocks
    )
    assert stats.out_of_memory == len(out_of_memory)
    assert (stats.preempted > 0) == (blocks == 60)


@pytest.mark.slow  # a second for each example
@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(1, 5),
    seqs=st.sampled_from([4, 7, 24]),
    blocks=st.sampled_from([31, 60, 300]),
    seed=st.integers(0, 99),
    out_of_memory=st.sets(st.integers(1, 60), max_size=2),
)
def test_late_looks_change_no_answer_whatever_happens(model, rows, expected, steps, seqs, blocks, seed, out_of_memory):
    assert_late_looks_change_no_answer(
        model, rows, expected, seed, out_of_memory, steps_per_read=steps, max_num_seqs=seqs, kv_blocks=blocks
    )


def test_the_next_window_is_queued_before_the_last_one_is_waited_for(model):
    made, device = late_engine(model, steps_per_read=3, max_num_seqs=8)
    rows = prompts(24, V, seed=2, longest=20, max_tokens=40, ignore_eos=True)
    with guarded(made, device):
        found = run(made, rows)
    assert answers(found) == answers(run(engine(model), rows))
    behind = made.scheduler.batch.async_copy.queued_behind
    assert set(behind) == {0, 1}
    assert behind.count(0) == 3, "only where all rows of a batch end at once is there nothing to queue"


def test_what_is_not_late_is_looked_at_after_every_window(model, rows, expected):
    async_copy = LateAsyncCopy()
    async_copy.late = False
    assert answers(run(engine(model, async_copy=async_copy, steps_per_read=2), rows)) == expected
    assert set(async_copy.queued_behind) == {0}


def test_rows_with_logprobs_are_looked_at_in_every_step(model):
    rows = prompts(12, V, seed=3, longest=30, temperature=1.0, logprobs=2, max_tokens=9)
    rows += [replace(row, id=f"other-{row.row}") for row in prompts(6, V, seed=4, longest=30, max_tokens=20)]
    made, _ = late_engine(model, steps_per_read=4, max_num_seqs=5)
    assert answers(run(made, rows)) == answers(run(engine(model), rows))


def test_what_has_ended_comes_out_when_the_run_is_stopped(model, rows, expected):
    for limit in range(3, 30, 4):
        polls = iter(range(1000))
        made, _ = late_engine(model, steps_per_read=2, max_num_seqs=6, should_stop=lambda: next(polls) >= limit)  # noqa: B023
        found = list(made.generate(plan(rows, Limits(6, 300, 4, 100))))
        by_key = {(completion.prompt.id, completion.sample_index): completion for completion in found}
        assert len(by_key) == len(found) < len(expected)
        assert answers(by_key) == {key: expected[key] for key in by_key}
        batch = made.scheduler.batch
        assert not batch.pending
        with torch.inference_mode():
            batch.upload()  # rows have moved to the slots of those that were handed out
        assert (batch.finish[: batch.num_active] == Finish.RUNNING).all(), "a row that has ended was not handed out"
