"""The triton backend, under Triton's interpreter where there is no GPU, against the torch backend: the same tokens."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from checkpoints import random_mixtral, save_hub
from engines import LateAsyncCopy, load, make_engine, packed_logits, prompts, run

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.engine.build import start_engine
from batchmix.engine.config import EngineConfig
from batchmix.engine.cuda_graphs import cuda_capture
from batchmix.engine.model_runner import run_largest_step
from batchmix.models import triton_ops
from batchmix.models.triton_ops import TritonOperators
from batchmix.prompts.stop_strings import build_stop_table

V = 128
# Small, because the interpreter takes about a millisecond for each program of a kernel.
SHAPE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 32, "head_dim": 32, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip
PIECES = [b"", b"", b""] + [bytes([97 + i % 7]) for i in range(V - 3)]
MIXED = [
    {"logprobs": 0},
    {"temperature": 1.0, "top_p": 0.8, "logprobs": 3},
    {"temperature": 1.3, "top_k": 60, "min_p": 0.001, "seed": 3, "n": 2},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "max_tokens": 9},
    {"presence_penalty": 1.5, "logit_bias": {9: 4.0, 10: 3.0}},
    {"temperature": 1.0, "allowed_token_ids": [2, 5, 6, 7, 8], "min_tokens": 4},
    {"temperature": 1.0, "stop": ["ab", "cc"], "max_tokens": 9},
    {"stop_token_ids": list(range(60, 90)), "ignore_eos": True},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hub(random_mixtral(**SHAPE), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, operators=TritonOperators())


def engine(model, **options):
    def stop_table(sampling):
        return build_stop_table(sampling.stop or [], PIECES, drops_leading_space=False)

    defaults = {"block_size": 4, "kv_blocks": 100, "max_model_len": 32, "stop_table": stop_table, "prefill_chunk": 8}
    return make_engine(model, **{**defaults, **options})


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, theirs in expected.items():
        ours = found[key]
        assert list(ours.token_ids) == list(theirs.token_ids), key
        assert (ours.finish_reason, ours.stop_reason) == (theirs.finish_reason, theirs.stop_reason)
        assert ours.end_token_id == theirs.end_token_id
        assert ours.num_tokens == theirs.num_tokens
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        for one, other in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
            assert (one.token_id, one.rank) == (other.token_id, other.rank)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


@pytest.fixture(scope="module")
def mixed():
    rows = prompts(len(MIXED), V, seed=1, longest=12, max_tokens=5)
    return [replace(row, sampling=replace(row.sampling, **asked)) for row, asked in zip(rows, MIXED, strict=True)]


@pytest.mark.slow  # 5 s and more
def test_logits_of_a_packed_prefill(folder, model):
    rows = [list(row.token_ids) for row in prompts(4, V, seed=6, longest=40)]
    for ours, theirs in zip(packed_logits(model, rows), packed_logits(load(folder), rows), strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.slow  # 5 s and more
def test_every_kind_of_sampling_side_by_side(folder, model, mixed):
    expected = run(engine(load(folder)), mixed)
    assert {c.finish_reason for c in expected.values()} == {"stop", "length"}
    assert any(isinstance(c.stop_reason, str) for c in expected.values())
    random.Random(3).shuffle(mixed)
    assert_same(run(engine(model, max_num_seqs=4), mixed, sort_window=5), expected)  # slots are freed and refilled


@pytest.mark.slow  # 10 s under the interpreter
def test_preempted_rows(folder, model):
    rows = prompts(4, V, seed=2, longest=6, temperature=1.0, max_tokens=9, ignore_eos=True, presence_penalty=0.5)
    expected = run(engine(load(folder)), rows)
    tight = engine(model, kv_blocks=8)
    tight.scheduler.mean_answer = 1.0  # of earlier answers: no blocks are kept free for those that grow longer
    assert_same(run(tight, rows), expected)
    assert tight.stats.preempted, "the test must run out of blocks"


@pytest.mark.slow  # 5 s and more
def test_several_steps_between_looks_and_capture_sizes(folder, model):
    """The engine as on a GPU, but for what a graph is: steps run over free slots and rows that have ended, and what they
    did is looked at one window late."""
    rows = prompts(7, V, seed=5, longest=8, temperature=1.0, max_tokens=8, presence_penalty=0.3, stop=["abc", "dd"])
    rows = [replace(row, sampling=replace(row.sampling, max_tokens=6 + 3 * row.row)) for row in rows]
    captured = []

    def capture(step):
        captured.append(step.args[:3])
        return step

    async_copy = LateAsyncCopy()
    fast = engine(model, max_num_seqs=6, kv_blocks=20, steps_per_read=3, capture=capture, async_copy=async_copy)
    assert_same(run(fast, rows), run(engine(load(folder)), rows))
    assert max(async_copy.queued_behind) == 1
    assert fast.stats.graphs_captured == len(captured)
    assert fast.stats.graphs_replayed >= len(captured) > 1
    assert {size for size, _, _ in captured} <= {1, 2, 4, 6}


@pytest.mark.slow  # 10 s under the interpreter
def test_out_of_memory_between_graphs(folder, model, monkeypatch):
    """InputBatch and graphs are made anew for half as many rows, and the answers stay: also of steps not read yet."""
    rows = prompts(7, V, seed=8, longest=8, temperature=1.0, max_tokens=7, presence_penalty=0.3)
    moe, calls = model.ops.moe, []

    def full_at_the_ninth(*arguments):
        calls.append(arguments)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return moe(*arguments)

    monkeypatch.setattr(model.ops, "moe", full_at_the_ninth)
    short = engine(model, max_num_seqs=6, steps_per_read=3, capture=lambda step: step, async_copy=LateAsyncCopy())
    tables, graphs = short.scheduler.batch.tables(), short.runner.graphs
    assert_same(run(short, rows), run(engine(load(folder)), rows))
    assert (short.stats.out_of_memory, short.scheduler.batch.capacity, short.runner.capture_sizes[-1]) == (1, 3, 3)
    assert short.runner.graphs is not graphs
    assert short.scheduler.batch.tables() != tables


@pytest.mark.slow  # 8 s under the interpreter
def test_rows_that_begin_alike_share_prefill_and_decode(folder, monkeypatch):
    """A prefix of a whole split of the decode kernel, so that both the cache and the kernel share it."""
    header = [3 + i % 90 for i in range(260)]
    rows = prompts(5, V, seed=6, longest=6, temperature=1.0, max_tokens=4, logprobs=0)
    rows = [replace(row, token_ids=header + list(row.token_ids)) for row in rows[:4]] + rows[4:]
    size = {"block_size": 64, "kv_blocks": 30, "max_model_len": 320, "prefill_chunk": 128}
    expected = run(engine(load(folder), **size), rows)
    shared = []
    original = triton_ops.find_shared_splits

    def watched(*arguments, **options):
        shared.append(original(*arguments, **options))
        return shared[-1]

    monkeypatch.setattr(triton_ops, "find_shared_splits", watched)
    model = load(folder, operators=TritonOperators(share_prefix=True))
    sharing = engine(model, share_prefix=True, **size)
    assert_same(run(sharing, [replace(row) for row in rows]), expected)
    assert sharing.stats.shared_tokens == 3 * 256
    assert any((splits.rows >= 0).sum() == 4 for splits in shared), "one item of four rows"
    assert len(shared) <= 4, "looked for when rows come and go, not in every step"


@pytest.mark.slow  # 2 s under the interpreter
def test_batch_invariant_products(folder):
    rows = prompts(3, V, seed=3, longest=12, temperature=1.0, max_tokens=3, logprobs=2)
    model = load(folder, operators=TritonOperators(batch_invariant=True))
    together = run(engine(model), rows)
    assert_same(together, run(engine(load(folder)), rows))
    alone = run(engine(model), rows[1:2])
    assert alone["row-1", 0] == together["row-1", 0], "bit by bit"


@pytest.mark.slow  # seconds under the interpreter, or of processes
def test_the_steps_that_memory_is_measured_with_run(model):
    for rows, tokens in ((3, 40), (1, 0)):
        run_largest_step(model, rows, tokens, torch.float32, block_size=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 on the interpreter")
def test_float16_runs(folder):
    rows = prompts(2, V, seed=4, longest=8, max_tokens=3)
    found = run(engine(load(folder, torch.float16, operators=TritonOperators())), rows)
    assert all(c.num_tokens for c in found.values())


@pytest.mark.gpu
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_cuda_graphs_change_no_token(folder, batch_invariant):
    model = load(folder, operators=TritonOperators(batch_invariant))
    rows = prompts(40, V, seed=7, longest=16, temperature=1.0, max_tokens=12, presence_penalty=0.3)
    expected = run(engine(model), rows)
    fast = engine(model, max_num_seqs=8, steps_per_read=3, capture=cuda_capture())
    found = run(fast, rows)
    assert_same(found, expected)
    assert fast.stats.graphs_replayed > fast.stats.graphs_captured > 0


@pytest.mark.gpu
def test_no_operator_waits_for_the_gpu(folder):
    """Compiled and captured once, an engine only ever waits for results that are a window late."""
    rows = prompts(40, V, seed=9, longest=16, temperature=1.0, max_tokens=12, presence_penalty=0.3)
    fast = engine(load(folder, operators=TritonOperators()), max_num_seqs=8, steps_per_read=3, capture=cuda_capture())
    expected = run(fast, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert_same(run(fast, rows), expected)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_start_gives_the_cache_what_is_left():
    started = start_engine(
        open_checkpoint(ModelConfig()), None, EngineConfig(gpu_memory_utilization=0.5), lambda: False
    )
    free, total = torch.cuda.mem_get_info()
    assert free >= 0.4 * total
    assert run(started, prompts(3, 32000, longest=30)).keys() == {(f"row-{row}", 0) for row in range(3)}
