"""The log-probability of each token among those that a grammar allowed, against transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import LateAsyncCopy, load, make_engine, prompts, run
from guided_vocabulary import V

from batchmix.models.triton_ops import TritonOperators
from batchmix.records import Completion, Prompt
from batchmix.sampling import StructuredOutputs
from batchmix.structured_output.compile import GrammarCompiler
from batchmix.structured_output.grammar import CompiledGrammar
from batchmix.structured_output.host_grammar import GrammarMatcher, HostGrammar, follow

pytest.importorskip("llguidance")

TICKET = {"type": "object", "properties": {"mood": {"enum": ["good", "bad", "mixed"]}, "note": {"type": "string"}},
          "required": ["mood"]}  # fmt: skip
TREE = {"type": "object", "properties": {"n": {"type": "boolean"}, "more": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["n"]}  # fmt: skip
WISHES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"logit_bias": {2: 4.0, 100: 3.0, 250: -4.0}, "frequency_penalty": 0.5},
    {"min_tokens": 30, "top_p": 0.7},
]


def asking(count: int, tokens: int) -> list[Prompt]:
    found = []
    for row in prompts(count, V, seed=3, longest=9, temperature=1.0):
        outputs = StructuredOutputs(json=TREE if row.row % 3 == 2 else TICKET, token_probabilities=row.row % 4 != 3)
        sampling = replace(row.sampling, **{**WISHES[row.row % len(WISHES)], "max_tokens": tokens})
        found.append(replace(row, sampling=replace(sampling, structured_outputs=outputs)))
    return found


def expected(reference: Any, grammars: GrammarCompiler, completion: Completion) -> list[float]:
    """Step by step: the model's logits, and what the grammar and min_tokens leave of them."""
    prompt, sampling = completion.prompt, completion.prompt.sampling
    tokens = [*completion.token_ids, *[2] * (completion.num_tokens - len(completion.token_ids))]
    with torch.inference_mode():
        logits = reference(torch.tensor([[*prompt.token_ids, *tokens]])).logits[0].double()
    grammar = grammars.get(sampling)
    text, state = (GrammarMatcher(grammar), 0) if isinstance(grammar, HostGrammar) else (None, grammar.start)
    found = []
    for place, token in enumerate(tokens):
        if text is None:
            assert isinstance(grammar, CompiledGrammar)
            allowed = grammar.allowed_tokens(state, sampling.max_tokens - place - 1).allowed.copy()
        else:
            allowed = text.following.tokens.allowed.copy()
        if place < sampling.min_tokens:
            allowed[2] = False
        left = logits[len(prompt.token_ids) + place - 1].masked_fill(~torch.from_numpy(allowed), float("-inf"))
        found.append(left.log_softmax(0)[token].item())
        if token == 2:
            break
        if text is None:
            state = grammar.next_state(state, token)
        else:
            text.take([token])
            follow([text])
    return found


@pytest.mark.parametrize("late", [False, True])
def test_they_are_those_of_transformers(folder, reference, grammars, late):
    options = {"async_copy": LateAsyncCopy(), "steps_per_read": 3} if late else {}
    engine = make_engine(load(folder), grammars=grammars, max_num_seqs=7, **options)
    rows, whole, forced = asking(24, 60), 0, 0
    for completion in run(engine, rows).values():
        found = completion.guided_logprobs
        if completion.error is not None or completion.prompt.row % 4 == 3:
            assert found is None
            continue
        whole += 1
        assert found is not None
        assert len(found) == completion.num_tokens
        forced += list(found).count(0.0)
        assert found == pytest.approx(expected(reference, grammars, completion), abs=1e-4)
    assert whole > 8
    assert forced > 50
    assert engine.stats.jump_forward_tokens > 50


@pytest.mark.slow  # 10 s under the interpreter
@pytest.mark.parametrize("capture", [None, lambda step: step])
def test_the_triton_backends_are_the_same(folder, grammars, capture):
    rows = asking(8 if capture else 3, 24 if capture else 16)
    rows = [row for row in rows if capture or row.row != 1]
    theirs = run(make_engine(load(folder), grammars=grammars), rows)
    triton = load(folder, operators=TritonOperators())
    ours = run(make_engine(triton, grammars=grammars, capture=capture, steps_per_read=2 if capture else 1), rows)
    assert sum(one.guided_logprobs is not None for one in ours.values()) >= (5 if capture else 1)
    for key, completion in ours.items():
        assert list(completion.token_ids) == list(theirs[key].token_ids)
        assert (completion.guided_logprobs is None) == (theirs[key].guided_logprobs is None)
        if completion.guided_logprobs is not None:
            assert completion.guided_logprobs == pytest.approx(theirs[key].guided_logprobs, abs=1e-4)
