"""The engine against transformers.generate, and against itself in other company."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from checkpoints import random_mixtral, save_fused, save_hub, save_mistral
from engines import ShortOfMemory, answers, load, make_engine, prompts, run, threads

from batchmix.errors import BatchmixError
from batchmix.models.mixtral import Mixtral
from batchmix.planning.in_flight import InFlight
from batchmix.planning.planner import Limits, plan
from batchmix.prompts.stop_strings import build_stop_table, find_stop
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig

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


@pytest.fixture(scope="module")
def ragged(reference):
    """200 prompts and transformers' greedy answers."""
    rows = prompts(200, 512, seed=1, longest=60, max_tokens=8)
    return rows, [greedy(reference, row.token_ids, 8) for row in rows]


@pytest.mark.parametrize(
    "save", [save_hub, *(pytest.param(save, marks=pytest.mark.slow) for save in (save_fused, save_mistral))]
)
def test_greedy_tokens_equal_transformers_on_200_ragged_prompts(reference, ragged, tmp_path, save):
    rows, expected = ragged
    found = run(make_engine(load(save(reference, tmp_path))), rows)
    assert [list(found[row.id, 0].token_ids) for row in rows] == expected


@pytest.mark.parametrize(
    "sampling", [pytest.param({"logprobs": 0}, marks=pytest.mark.slow), SAMPLED], ids=["greedy", "sampled"]
)
def test_answers_do_not_depend_on_company(model, sampling):
    rows = prompts(40, 512, seed=2, **sampling)
    expected = answers(run(make_engine(model, prefill_chunk=64), rows))
    assert len({str(answer) for answer in expected.values()}) > 33, "the answers must differ for this to say anything"
    shuffled = random.Random(5).sample(rows, len(rows))
    for seqs, batched, blocks, order, window in [
        (1, 512, 2000, rows[::4], 1000),
        (7, 512, 2000, rows, 10),
        (64, 2048, 2000, shuffled, 1000),
        (16, 64, 2000, rows, 1),
        (32, 512, 40, shuffled, 1000),  # blocks for about seven rows at a time
    ]:
        engine = make_engine(
            model, max_num_seqs=seqs, max_num_batched_tokens=batched, kv_blocks=blocks, prefill_chunk=64
        )
        found = answers(run(engine, order, window))
        assert found == {key: expected[key] for key in found}
        assert len(found) == len(order)
    alone = run(make_engine(model, prefill_chunk=64), rows[7:8])
    assert answers(alone) == {key: expected[key] for key in alone}


MIXED = [
    {},
    {"temperature": 1.0, "top_p": 0.8, "logprobs": 5},
    {"temperature": 1.3, "top_k": 300, "min_p": 0.001, "seed": 3},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 0, "max_tokens": 25},
    {"presence_penalty": 1.5, "logit_bias": {9: 4.0, 10: 3.0}, "logprobs": 1},
    {"temperature": 1.0, "allowed_token_ids": [2, 5, 6, 7, 8], "min_tokens": 4, "n": 3},
    {"temperature": 1.0, "stop": ["ab", "cc"], "max_tokens": 40, "logprobs": 2},
    {"stop_token_ids": list(range(100, 160)), "ignore_eos": True, "max_tokens": 30},
]
PIECES = [b"", b"", b""] + [bytes([97 + i % 7]) * (1 + i // 7 % 3) for i in range(509)]


def toy_stop_table(sampling):
    return build_stop_table(sampling.stop or [], PIECES, drops_leading_space=False)


@pytest.mark.slow  # 5 s and more
def test_rows_that_ask_for_different_things_do_not_meet(model):
    """Every kind of sampling side by side, slots freed and refilled: nothing of one row is left to another."""
    rows = []
    for settings in MIXED:
        rows += [
            Prompt(len(rows) + i, f"row-{len(rows) + i}", {}, row.token_ids, replace(row.sampling, **settings))
            for i, row in enumerate(prompts(6, 512, seed=len(rows), longest=40))
        ]
    expected = {}
    for row in rows:
        expected |= answers(run(make_engine(model, stop_table=toy_stop_table), [row]))
    for seqs, blocks in [(64, 2000), (5, 2000), (24, 35)]:
        random.Random(seqs).shuffle(rows)
        engine = make_engine(model, stop_table=toy_stop_table, max_num_seqs=seqs, kv_blocks=blocks)
        assert answers(run(engine, rows, sort_window=17)) == expected


@pytest.fixture(scope="module")
def undisturbed(model):
    """Rows, and what they are answered while there is memory."""
    rows = prompts(40, 512, seed=21, temperature=1.0, logprobs=1, max_tokens=20)
    rows += prompts(5, 512, seed=22, temperature=1.0, n=3)
    rows = [replace(row, row=number, id=f"row-{number}") for number, row in enumerate(rows)]
    return rows, answers(run(make_engine(model, prefill_chunk=64), rows))


@pytest.mark.parametrize(
    "calls", [{1}, *(pytest.param(n, marks=pytest.mark.slow) for n in ({9}, {40}, {41}, {12, 13, 50}))]
)
def test_out_of_memory_halves_the_batch_and_changes_no_answer(model, undisturbed, caplog, calls):
    """Two layers call `moe` once each: its calls fall into prefills and decode steps, early and late ones."""
    rows, expected = undisturbed
    short = Mixtral(model.config, model.weights, ShortOfMemory("moe", calls), 512)
    engine = make_engine(short, max_num_seqs=24, max_num_batched_tokens=256, prefill_chunk=64)
    assert answers(run(engine, rows)) == expected
    assert engine.stats.out_of_memory == len(calls)
    assert engine.scheduler.batch.capacity == 24 >> len(calls)
    assert engine.stats.completion_tokens == sum(answer[3] for answer in expected.values()), "each token counts once"
    lines = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert len(lines) == len(calls)
    assert "going on with 12 rows at once (was 24) and 128 tokens in a step (was 256)" in lines[0]


def test_out_of_memory_with_one_row_is_an_error_of_one_line(model):
    short = Mixtral(model.config, model.weights, ShortOfMemory("moe", set(range(1000))), 512)
    with pytest.raises(
        BatchmixError, match=r"out of memory with one row at a time; lower engine\.gpu_memory_utilization"
    ):
        run(make_engine(short), prompts(8, 512))


def test_stop_strings_end_a_row_where_its_text_first_contains_one(model):
    stop = ["abc", "ddddd", "gfa", "eeeee"]
    rows = prompts(24, 512, seed=12, longest=20, temperature=1.5, max_tokens=60, stop=stop)
    free = run(make_engine(model), [replace(row, sampling=replace(row.sampling, stop=None)) for row in rows])
    found = run(make_engine(model, stop_table=toy_stop_table), rows)
    stopped = 0
    for key, completion in found.items():
        unstopped = free[key]
        ids = list(unstopped.token_ids)
        for count in range(1, len(ids) + 1):
            text = b"".join(PIECES[token] for token in ids[:count])
            if hit := find_stop(text, [string.encode() for string in stop]):
                assert list(completion.token_ids) == ids[:count]
                assert (completion.finish_reason, completion.stop_reason) == ("stop", stop[hit[2]])
                assert completion.num_tokens == count
                stopped += 1
                break
        else:
            assert list(completion.token_ids) == ids
            assert completion.finish_reason == unstopped.finish_reason
    assert 6 < stopped < len(rows)


def test_logprobs_are_those_of_transformers(model, reference):
    rows = prompts(12, 512, seed=13, longest=40, temperature=0.8, top_p=0.9, logprobs=4, logit_bias={11: 2.0})
    for (row_id, _), completion in run(make_engine(model), rows).items():
        prompt = next(row for row in rows if row.id == row_id)
        entries = completion.logprobs
        chosen = [entry.token_id for entry in entries]
        assert chosen[: len(completion.token_ids)] == list(completion.token_ids)
        assert len(entries) == completion.num_tokens
        with torch.inference_mode():
            logits = reference(torch.tensor([list(prompt.token_ids) + chosen])).logits[0].log_softmax(-1)
        expected = logits[len(prompt.token_ids) - 1 : -1]
        for entry, scores in zip(entries, expected, strict=True):
            assert entry.logprob == pytest.approx(scores[entry.token_id].item(), abs=1e-4)
            likelier = scores - scores[entry.token_id]  # those nearer than rounding may be on either side
            assert (likelier > 1e-4).sum() < entry.rank <= (likelier > -1e-4).sum()
            assert [value for _, value in entry.top] == pytest.approx(scores.topk(4).values.tolist(), abs=1e-4)
            assert all(value == pytest.approx(scores[token].item(), abs=1e-4) for token, value in entry.top)
        assert completion.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in entries))


def test_requests_that_are_dropped_leave_nothing_behind(model):
    rows = prompts(12, 512, seed=5, longest=40, temperature=1.0, logprobs=2, max_tokens=20)
    engine = make_engine(model, max_num_seqs=4)
    expected = run(engine, rows)
    with torch.inference_mode():
        assert list(engine.enqueue(rows)) == []
        for _ in range(3):
            engine.step()
    assert engine.scheduler.running
    assert engine.scheduler.waiting
    engine.abort()
    assert engine.scheduler.is_idle
    assert engine.scheduler.pool.num_used == 0
    assert run(engine, rows) == expected


def test_min_tokens_stop_tokens_and_ignored_end_of_sequence(model):
    base = {"temperature": 1.0, "max_tokens": 10, "logit_bias": {2: 12.0, 30: 11.0}}  # ends soon, one way or another
    kinds = {
        "plain": run(make_engine(model), prompts(20, 512, seed=14, **base)),
        "stop": run(make_engine(model), prompts(20, 512, seed=14, stop_token_ids=[30], **base)),
        "late": run(make_engine(model), prompts(20, 512, seed=14, stop_token_ids=[30], min_tokens=6, **base)),
        "never": run(make_engine(model), prompts(20, 512, seed=14, ignore_eos=True, **base)),
    }
    assert {c.finish_reason for c in kinds["plain"].values()} == {"stop"}
    assert {c.stop_reason for c in kinds["plain"].values()} == {None}
    assert {c.stop_reason for c in kinds["stop"].values()} == {None, 30}
    for completion in [*kinds["plain"].values(), *kinds["stop"].values()]:
        assert completion.num_tokens == len(completion.token_ids) + 1, "the stop token is counted and left out"
        assert 2 not in completion.token_ids
    assert all(7 <= c.num_tokens <= 10 for c in kinds["late"].values())
    assert all(c.finish_reason == "length" and len(c.token_ids) == 10 for c in kinds["never"].values())
    assert any(2 in c.token_ids for c in kinds["never"].values())


@pytest.mark.parametrize("count", [2, 3])
def test_answers_on_several_threads_do_not_depend_on_company(model, count):
    rows = prompts(20, 512, seed=15, **SAMPLED)
    with threads(count):
        expected = answers(run(make_engine(model), rows))
        assert answers(run(make_engine(model, max_num_seqs=6), rows[::-1])) == expected


@pytest.mark.slow  # 5 s and more
def test_too_few_blocks_put_rows_back(model):
    rows = prompts(20, 512, seed=4, longest=20, max_tokens=120, ignore_eos=True)
    engine = make_engine(model, kv_blocks=40)
    found = run(engine, rows)
    assert engine.stats.preempted, "the test must run out of blocks"
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
        found = run(make_engine(model, max_model_len=64), [row])[row.id, 0]
        assert found.finish_reason == "length"
        assert len(row.token_ids) + found.num_tokens == 64


def test_error_prompts_come_through(model):
    bad = Prompt(5, "bad", {}, [], SamplingConfig(), error="too long")
    found = run(make_engine(model), [*prompts(3, 512), bad])
    assert found["bad", 0].finish_reason == "error"
    assert found["bad", 0].error == "too long"
    assert len(found) == 4


def test_prompts_that_must_wait_for_memory_run_all_the_same(model):
    """Batches of one row, of which two may be on their way: the engine asks for more in vain and goes on."""
    rows = [replace(row, num_bytes=10) for row in prompts(12, 512)]
    expected = run(make_engine(model), rows)
    in_flight = InFlight(25)
    found = {}
    batches = in_flight.admit(plan(rows, Limits(8, 100, 16, 100, batch_bytes=10)))
    for completion in make_engine(model, max_num_seqs=8).generate(batches):
        in_flight.completed(completion)
        found[completion.prompt.id, completion.sample_index] = completion
    assert in_flight.peak_bytes <= 25
    assert answers(found) == answers(expected)


def test_should_stop_ends_early(model):
    steps = iter(range(1000))
    engine = make_engine(model, should_stop=lambda: next(steps) > 20, max_num_seqs=2)
    found = list(engine.generate(plan(prompts(50, 512), Limits(2, 100, 16, 100))))
    assert 0 < len(found) < 50


def test_a_row_longer_than_the_cache_is_a_mistake_of_the_caller(model):
    with pytest.raises(ValueError, match="cannot hold one row"):
        make_engine(model, kv_blocks=3, max_model_len=512)


def test_no_end_of_sequence_token(model, reference):
    rows = prompts(5, 512, seed=11)
    found = run(make_engine(model, eos_token_ids=()), rows)
    assert all(completion.finish_reason == "length" for completion in found.values())
