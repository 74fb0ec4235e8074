"""Rows that the host follows, through the engine: every answer fits or is an error that says so, on both backends."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import Any

import pytest
from engines import LateAsyncCopy, answers, load, make_engine, prompts, run, tokens_of
from guided_strategies import RECURSIVE
from guided_vocabulary import PIECES, VOCABULARY, V
from hypothesis import assume, given, settings
from links import FakeLink

from batchmix.engine.engine import Engine
from batchmix.engine.grammars import RowGrammars
from batchmix.models.triton_ops import TritonOperators
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.structured_output.host_grammar import HostGrammar
from batchmix.structured_output.pattern import Unsupported

jsonschema = pytest.importorskip("jsonschema")  # of the `annotate` extra
pytest.importorskip("llguidance")

TREE = {"type": "object", "properties": {"n": {"type": "boolean"}, "more": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["n"]}  # fmt: skip
CLOSING = {token: 3.0 for token, piece in enumerate(PIECES) if piece[:1] in (b'"', b"]", b"}")}  # so that texts end


def engine(model, grammars, **options) -> Engine:
    return make_engine(
        model, **{"block_size": 8, "max_model_len": 160, "prefill_chunk": 16, "grammars": grammars, **options}
    )


def check_fits(completion: Completion) -> None:
    outputs = completion.prompt.sampling.structured_outputs
    if completion.finish_reason == "error":
        assert f"after {completion.prompt.sampling.max_tokens} tokens the text was not whole" in (
            completion.error or ""
        )
        assert completion.num_tokens == completion.prompt.sampling.max_tokens
        return
    assert completion.num_tokens <= completion.prompt.sampling.max_tokens
    if outputs is not None:
        value = json.loads(VOCABULARY.decode([completion.token_ids], True)[0])
        assert jsonschema.Draft202012Validator(outputs.json).is_valid(value)


def check_fuzzed(model, grammars, schema: dict[str, Any], seed: int, count: int = 6) -> None:
    sampling = SamplingConfig(
        temperature=1.0, seed=seed, logit_bias=CLOSING, structured_outputs=StructuredOutputs(json=schema)
    )
    try:
        grammar = grammars.get(sampling)
    except Unsupported as error:
        assume("no text fits" not in str(error))
        raise
    assert isinstance(grammar, HostGrammar)
    rows = [
        replace(row, sampling=replace(sampling, max_tokens=(2, 10, 40, 100)[row.row % 4]))
        for row in prompts(count, V, seed=seed, longest=8)
    ]
    for completion in run(engine(model, grammars), rows).values():
        check_fits(completion)


@pytest.mark.slow  # some 5 s
@settings(max_examples=8, deadline=None)
@given(RECURSIVE)
def test_fuzzed_recursive_schemas(model, grammars, schema):
    check_fuzzed(model, grammars, schema, 1)


@pytest.mark.slow  # 30 s
@settings(max_examples=150, deadline=None)
@given(RECURSIVE)
def test_many_fuzzed_recursive_schemas(model, grammars, schema):
    check_fuzzed(model, grammars, schema, 2)


@pytest.mark.slow  # 20 s under the interpreter
@settings(max_examples=2, deadline=None)
@given(RECURSIVE)
def test_fuzzed_recursive_schemas_on_the_triton_backend(folder, grammars, schema):
    check_fuzzed(load(folder, operators=TritonOperators()), grammars, schema, 3, count=3)


TICKET = {"type": "object", "properties": {"sentiment": {"enum": ["positive", "negative"]}, "urgent": {"type": "boolean"}},
          "required": ["sentiment", "urgent"]}  # fmt: skip
WISHES: list[dict[str, Any]] = [
    {"max_tokens": 100, "logit_bias": CLOSING},
    {"max_tokens": 45, "min_tokens": 5, "logprobs": 1},
    {"max_tokens": 60, "presence_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": CLOSING},
    {"max_tokens": 70, "logit_bias": {**CLOSING, 2: 3.0}, "top_p": 0.8},
    {"max_tokens": 71, "stop_token_ids": [1], "n": 2, "logit_bias": CLOSING},
    {"max_tokens": 72, "ignore_eos": True, "top_k": 20, "logit_bias": CLOSING},
    {"max_tokens": 8},
]


@pytest.fixture(scope="module")
def mixed() -> list[Prompt]:
    """Rows that the host follows, among rows with tables, whose stretches are forced, and rows without a grammar."""
    asked: list[Any] = [TREE, {"type": "array", "items": {"type": "array"}}, {}, TICKET, None]
    found = []
    for row in prompts(len(asked) * len(WISHES), V, seed=7, longest=30, temperature=1.0):
        schema = asked[row.row % len(asked)]
        sampling = replace(row.sampling, **WISHES[row.row // len(asked)])
        if schema is TICKET:
            sampling = replace(sampling, max_tokens=60)
        outputs = None if schema is None else StructuredOutputs(json=schema)
        found.append(replace(row, sampling=replace(sampling, structured_outputs=outputs)))
    return found


@pytest.fixture(scope="module")
def one_by_one(model, grammars, mixed):
    return run(engine(model, grammars, max_num_seqs=1), mixed)


@pytest.mark.slow  # 5 s and more
def test_the_host_goes_with_everything_else_that_a_row_may_ask_for(one_by_one):
    reasons = set()
    for completion in one_by_one.values():
        check_fits(completion)
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length", "error"}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"kv_blocks": 25, "max_num_seqs": 16}, marks=pytest.mark.slow),
        {"async_copy": LateAsyncCopy(), "steps_per_read": 3, "max_num_seqs": 7},
        pytest.param({"async_copy": LateAsyncCopy(), "kv_blocks": 25, "max_num_seqs": 16}, marks=pytest.mark.slow),
        pytest.param({"host": FakeLink(), "max_num_batched_tokens": 60}, marks=pytest.mark.slow),
    ],
    ids=["many slots", "few blocks", "late looks", "late looks, few blocks", "cache on the host"],
)
def test_answers_do_not_depend_on_company(model, grammars, mixed, one_by_one, options):
    shuffled = random.Random(1).sample(mixed, len(mixed))
    tried = engine(model, grammars, **options)
    found = run(tried, shuffled, sort_window=9)
    assert answers(found) == answers(one_by_one)
    assert {key: one.error for key, one in found.items()} == {key: one.error for key, one in one_by_one.items()}
    assert (tried.stats.preempted > 0) == ("kv_blocks" in options)
    assert tried.stats.jump_forward_tokens > 0


def test_masks_are_found_while_the_model_runs(model, grammars, mixed, monkeypatch):
    """The model's part of a step is queued before the host waits for the tokens of the step before it."""
    rows = [row for row in mixed if row.row % 5 == 0 and row.sampling.logprobs is None]
    tried, order = engine(model, grammars, async_copy=LateAsyncCopy()), []
    original, accepted = model.logits, RowGrammars.accept_tokens

    def logits(hidden):
        order.append("model")
        return original(hidden)

    def accept_tokens(self, outputs):
        order.append("masks")
        accepted(self, outputs)

    monkeypatch.setattr(model, "logits", logits)
    monkeypatch.setattr(RowGrammars, "accept_tokens", accept_tokens)
    run(tried, rows)
    steps = "".join(name[1] for name in order)
    assert re.fullmatch("oo(ao){8,}a+", steps), "the prefill, then each decode step's model before the masks for it"


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.parametrize(
    "capture", [None, pytest.param(lambda step: step, marks=pytest.mark.slow)], ids=["steps", "graphs"]
)
def test_the_triton_backend_gives_the_same_tokens(folder, grammars, mixed, capture):
    triton = load(folder, operators=TritonOperators(share_prefix=capture is not None))
    some = [replace(row, token_ids=row.token_ids[:6]) for row in (mixed[0], mixed[1], mixed[3], mixed[4], mixed[22])]
    most = 40 if capture else 6
    some = [replace(row, sampling=replace(row.sampling, n=1, max_tokens=60 if row.row == 3 else most)) for row in some]
    if capture is None:
        some = [some[0], some[4]]
    expected = run(engine(load(folder), grammars), some)
    tried = engine(triton, grammars, max_num_seqs=4, capture=capture, share_prefix=capture is not None,
                   steps_per_read=1 if capture is None else 2)  # fmt: skip
    assert tokens_of(run(tried, some)) == tokens_of(expected)
