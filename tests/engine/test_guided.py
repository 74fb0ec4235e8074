"""Guided rows through the engine: every answer of a model with random weights fits, on both backends."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import LateAsyncCopy, answers, load, make_engine, prompts, run, tokens_of
from guided_strategies import REGEXES, SCHEMAS
from guided_vocabulary import VOCABULARY, V, encode
from hypothesis import assume, given, settings
from links import FakeLink

from batchmix.engine import engine as engine_module
from batchmix.engine.output_processor import wait_for_steps
from batchmix.models.triton_ops import TritonOperators
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.structured_output.pattern import Unsupported

jsonschema = pytest.importorskip("jsonschema")  # of the `annotate` extra

TICKET = {
    "type": "object",
    "properties": {"sentiment": {"enum": ["positive", "negative"]}, "urgent": {"type": "boolean"},
                   "note": {"type": "string"}},
    "required": ["sentiment", "urgent"],
}  # fmt: skip


def engine(model, grammars, **options):
    return make_engine(
        model, **{"block_size": 8, "max_model_len": 128, "prefill_chunk": 16, "grammars": grammars, **options}
    )


def guided(rows: list[Prompt], **asked: Any) -> list[Prompt]:
    return [replace(row, sampling=replace(row.sampling, structured_outputs=StructuredOutputs(**asked))) for row in rows]


def text_of(completion: Completion) -> str:
    return VOCABULARY.decode([completion.token_ids], True)[0]


def fits(completion: Completion) -> bool:
    outputs, text = completion.prompt.sampling.structured_outputs, text_of(completion)
    if outputs.choice is not None:
        return text in outputs.choice
    if outputs.regex is not None:
        return re.fullmatch(outputs.regex, text) is not None
    return jsonschema.Draft202012Validator(outputs.json).is_valid(json.loads(text))


def check_fuzzed(model, grammars, asked: dict[str, Any], seed: int, count: int = 6) -> None:
    """Rows with little room and with some; those for which there is too little are the prompt stage's."""
    rows = []
    sampling = SamplingConfig(temperature=1.0, seed=seed, structured_outputs=StructuredOutputs(**asked))
    try:
        needed = max(grammars.get(sampling).tokens_needed(0), 1)
    except Unsupported as error:
        assume("too large" not in str(error) and "no text" not in str(error))
        raise
    assume(needed <= 60)
    for row in prompts(count, V, seed=seed, longest=8, temperature=1.0):
        room = needed + (0, 1, 5, 20, 50)[row.row % 5]
        rows.append(replace(row, sampling=replace(sampling, max_tokens=room)))
    for completion in run(engine(model, grammars), rows).values():
        assert fits(completion), (asked, text_of(completion))
        assert completion.num_tokens <= completion.prompt.sampling.max_tokens


@settings(max_examples=8, deadline=None)
@given(REGEXES)
def test_fuzzed_regexes(model, grammars, regex):
    check_fuzzed(model, grammars, {"regex": regex}, 1)


@settings(max_examples=8, deadline=None)
@given(SCHEMAS)
def test_fuzzed_schemas(model, grammars, schema):
    check_fuzzed(model, grammars, {"json": schema}, 2)


@pytest.mark.slow  # 40 s
@settings(max_examples=150, deadline=None)
@given(REGEXES, SCHEMAS)
def test_many_fuzzed_regexes_and_schemas(model, grammars, regex, schema):
    check_fuzzed(model, grammars, {"regex": regex}, 3)
    check_fuzzed(model, grammars, {"json": schema}, 4)


@pytest.mark.slow  # 30 s under the interpreter
@settings(max_examples=4, deadline=None)
@given(REGEXES, SCHEMAS)
def test_fuzzed_regexes_and_schemas_on_the_triton_backend(folder, grammars, regex, schema):
    triton = load(folder, operators=TritonOperators())
    for asked in ({"regex": regex}, {"json": schema}):
        check_fuzzed(triton, grammars, asked, 5, count=3)


MIXED: list[dict[str, Any]] = [
    {"json": TICKET},
    {"choice": ["positive", "negative", "neg", " a"]},
    {"regex": "[a-z]+\\d?"},
    {"regex": "(ab){2,}"},
    {},
]
WISHES: list[dict[str, Any]] = [
    {"max_tokens": 50},
    {"max_tokens": 45, "min_tokens": 5, "logprobs": 1},
    {"max_tokens": 40, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"max_tokens": 40, "logit_bias": {100: 5.0, 2: 3.0}, "top_p": 0.8},
    {"max_tokens": 41, "stop_token_ids": [1, 100], "n": 2},
    {"max_tokens": 42, "ignore_eos": True, "top_k": 20},
    {"max_tokens": 60, "allowed_token_ids": list(range(3, 259))},
    {"max_tokens": 40, "temperature": 0.0},
]


@pytest.fixture(scope="module")
def mixed():
    """Every grammar with every other wish."""
    rows = prompts(len(MIXED) * len(WISHES), V, seed=7, longest=30, temperature=1.0)
    found = []
    for row in rows:
        asked = MIXED[row.row % len(MIXED)]
        sampling = replace(row.sampling, **WISHES[row.row // len(MIXED)])
        found.append(
            replace(row, sampling=replace(sampling, structured_outputs=StructuredOutputs(**asked) if asked else None))
        )
    return found


@pytest.fixture(scope="module")
def unskipped(model, grammars, mixed):
    """Their answers with a step for each token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "find_jump_forward", lambda batch, most: [])
        plain = engine(model, grammars)
        found = run(plain, mixed)
    assert plain.stats.jump_forward_tokens == 0
    return found


def test_grammars_go_with_everything_else_that_a_row_may_ask_for(unskipped):
    reasons = set()
    for completion in unskipped.values():
        sampling = completion.prompt.sampling
        if sampling.structured_outputs is None:
            continue
        assert fits(completion), (sampling, text_of(completion))
        assert not set(completion.token_ids) & {0, 1, 2, *(sampling.stop_token_ids or ())}
        if sampling.allowed_token_ids:
            assert set(completion.token_ids) <= set(sampling.allowed_token_ids)
        if sampling.min_tokens and sampling.structured_outputs.regex == "(ab){2,}":
            assert completion.num_tokens >= sampling.min_tokens, "these texts can be longer"
        reasons.add((completion.finish_reason, completion.stop_reason))
    assert {("stop", None), ("length", None)} <= reasons


def test_forced_stretches_save_their_steps_and_change_no_bit(model, grammars, mixed, unskipped):
    skipping = engine(model, grammars)
    found = run(skipping, mixed)
    assert answers(found) == answers(unskipped)
    assert skipping.stats.jump_forward_tokens > 300
    assert skipping.stats.completion_tokens == sum(completion.num_tokens for completion in found.values())


def test_each_forced_token_is_a_step_less(model, grammars, mixed):
    alone, steps = engine(model, grammars), []
    original = alone.runner.run
    alone.runner.run = lambda step: (steps.append(step.num_decode), original(step))[1]  # type: ignore[method-assign]
    (completion,) = run(alone, mixed[:1]).values()
    assert alone.stats.jump_forward_tokens > 20
    assert sum(steps) == completion.num_tokens - 1 - alone.stats.jump_forward_tokens


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_num_seqs": 3}, marks=pytest.mark.slow),
        pytest.param({"kv_blocks": 18, "max_num_seqs": 16}, marks=pytest.mark.slow),
        {"async_copy": LateAsyncCopy(), "steps_per_read": 3, "max_num_seqs": 7},
        pytest.param({"host": FakeLink(), "max_num_batched_tokens": 60}, marks=pytest.mark.slow),
    ],
    ids=["few slots", "few blocks", "late looks", "cache on the host"],
)
def test_answers_do_not_depend_on_company(model, grammars, mixed, unskipped, options):
    shuffled = random.Random(1).sample(mixed, len(mixed))
    tried = engine(model, grammars, **options)
    assert answers(run(tried, shuffled, sort_window=9)) == answers(unskipped)
    assert (tried.stats.preempted > 0) == ("kv_blocks" in options)


def see_each_step(tried) -> list[list[int]]:
    """How many tokens each row has after each step, which are as many as were planned for it."""
    scheduler, original, lengths = tried.scheduler, tried.runner.run, []

    def run_and_record(step):
        original(step)
        wait_for_steps(scheduler, wait_for_all=True)
        counts = scheduler.batch.outputs.count[: len(scheduler.running)].tolist()
        assert scheduler.batch.planned[: len(scheduler.running)].tolist() == counts
        lengths.append(counts)

    tried.runner.run = run_and_record
    return lengths


@pytest.mark.slow  # 5 s and more
def test_what_is_planned_of_a_row_is_what_it_gets(model, grammars, mixed):
    tried = engine(model, grammars, kv_blocks=18, max_num_seqs=16, max_num_batched_tokens=12)
    see_each_step(tried)
    for seed in (1, 2):
        run(tried, random.Random(seed).sample(mixed, len(mixed)), sort_window=9)
    assert tried.stats.preempted
    assert tried.stats.jump_forward_tokens


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.parametrize(
    "capture", [None, pytest.param(lambda step: step, marks=pytest.mark.slow)], ids=["steps", "graphs"]
)
def test_the_triton_backend_gives_the_same_tokens(folder, grammars, mixed, unskipped, capture):
    triton = load(folder, operators=TritonOperators(share_prefix=capture is not None))
    some = [replace(row, token_ids=row.token_ids[:6]) for row in mixed[1:4] + mixed[22:24]]
    some = [
        replace(row, sampling=replace(row.sampling, max_tokens=60 if row.row == 0 else 9 if capture else 6))
        for row in some[:: 1 if capture else 2]
    ]
    expected = run(engine(load(folder), grammars), some)
    tried = engine(triton, grammars, max_num_seqs=4, capture=capture, share_prefix=capture is not None,
                   steps_per_read=1 if capture is None else 2)  # fmt: skip
    assert tokens_of(run(tried, some)) == tokens_of(expected)
    assert tried.stats.jump_forward_tokens > 0 or capture is None


CHOICES = ["positive", "negative", "neg", "é"]


def brute_force(reference, token_ids: list[int], ends: bool = True) -> list[float]:
    """The choices' probabilities by transformers, one sequence at a time."""
    scores = []
    for choice in encode(CHOICES):
        ids = [*token_ids, *choice, *([2] if ends else [])]
        with torch.inference_mode():
            logits = reference(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        places = range(len(token_ids), len(ids))
        scores.append(sum(logits[place - 1, ids[place]].item() for place in places))
    return torch.tensor(scores).double().softmax(0).tolist()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_scored_choices_are_those_of_transformers(folder, reference, grammars, backend):
    triton = backend == "triton"
    loaded = load(folder, operators=TritonOperators(share_prefix=True)) if triton else load(folder)
    rows = guided(prompts(3 if triton else 12, V, seed=9, longest=40, n=3), choice=CHOICES, score_choices=True)
    rows[1] = replace(rows[1], sampling=replace(rows[1].sampling, ignore_eos=True))
    same = [*rows[0].token_ids[:1], *range(50, 70)]
    for i in (0, 2):
        rows[i] = replace(rows[i], token_ids=[*same, 5 + i], shared_tokens=len(same))
    tried = engine(loaded, grammars, share_prefix=triton, max_num_batched_tokens=64, kv_blocks=40)
    found = run(tried, rows)
    for row in rows:
        expected = brute_force(reference, list(row.token_ids), ends=row.row != 1)
        for sample in range(3):
            completion = found[row.id, sample]
            assert completion.choice_probabilities == pytest.approx(expected, abs=1e-4)
            assert text_of(completion) == CHOICES[max(range(4), key=expected.__getitem__)]
            assert completion.finish_reason == "stop"
    assert not triton or tried.stats.shared_tokens > 0


def test_scored_answers_are_drawn_and_do_not_depend_on_company(model, grammars):
    rows = prompts(10, V, seed=10, longest=40, temperature=40.0, n=4)
    rows = [*guided(rows[:7], choice=CHOICES, score_choices=True), *rows[7:]]
    expected = run(engine(model, grammars), rows)
    drawn = {text_of(completion) for completion in expected.values() if completion.choice_probabilities is not None}
    assert drawn == set(CHOICES)
    for options in (
        {"max_num_seqs": 2},
        {"max_num_batched_tokens": 32},
        {"kv_blocks": 17, "max_num_seqs": 4},
        {"host": FakeLink()},
    ):
        found = run(engine(model, grammars, **options), rows[::-1], sort_window=4)
        assert answers(found) == answers(expected)
        for key, completion in found.items():
            assert completion.choice_probabilities == expected[key].choice_probabilities
