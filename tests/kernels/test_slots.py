"""A token's effect on its row, against the oracle and against `advance` of the torch backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_bitwise_equal, poison
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchmix.config import SamplingConfig
from batchmix.data.stop_strings import build_stop_table
from batchmix.engine import input_batch as engine_slots
from batchmix.engine.input_batch import InputBatch
from batchmix.engine.sampling import choose
from batchmix.kernels import reference
from batchmix.kernels import slots as kernel
from batchmix.kernels.sampling import sample
from batchmix.kernels.slots import advance
from batchmix.model import torch_backend
from batchmix.model.async_copy import AsyncCopy
from batchmix.records import Prompt

V = 40
PIECES = [b"", b"", b""] + [bytes([97 + i % 4]) * (1 + i // 4 % 3) for i in range(V - 3)]
STATE = ["token", "context", "generated", "finish", "stop_reason", "stop_state"]
WISHES = ["penalised", "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "stop_base"]
# In the order that `advance` takes them.
ORDER = [
    "token", "context", "generated", "finish", "stop_reason", "stop_state", "history", "logprob_history",
    "output_counts", "penalised", "max_tokens", "min_tokens", "ignore_eos", "eos_token_ids", "stop_token_ids",
    "stop_base", "automata", "grammar_state", "grammar_base", "grammar_class", "grammar_tables", "grammar_classes",
]  # fmt: skip
CHANGED = [*STATE, "history", "logprob_history", "output_counts"]

SAMPLINGS = st.builds(
    SamplingConfig,
    max_tokens=st.integers(1, 8),
    min_tokens=st.sampled_from([0, 0, 1, 3]),
    stop=st.sampled_from([None, ["ab"], ["b", "aab"], ["cc", "ca", "dddd"]]),
    stop_token_ids=st.sampled_from([None, [3], [1, 7, 6]]),
    ignore_eos=st.booleans(),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
)


def slots_for(samplings: list[SamplingConfig]) -> InputBatch:
    slots = InputBatch(
        len(samplings), V, 4, (2, 9), lambda s: build_stop_table(s.stop or [], PIECES, drops_leading_space=False),
        AsyncCopy(torch.device("cpu")),
    )  # fmt: skip
    for row, sampling in enumerate(samplings):
        slots.add(Prompt(row, str(row), {}, [5, 6, 7], sampling), 0, sampling.max_tokens)
    slots.upload()
    return slots


def arguments(slots: InputBatch, device: torch.device, history: int = 8) -> dict[str, Tensor | None]:
    """What `advance` takes beside tokens and log-probabilities: copies of the slots' fields, empty histories, no grammars."""
    found: dict[str, Any] = {name: getattr(slots, name).clone() for name in (*STATE, *WISHES)}
    counts = slots.output_counts
    found |= {"output_counts": None if counts is None else counts.clone(), "eos_token_ids": slots.eos_token_ids}
    found["automata"] = slots.automata.data
    rows = slots.capacity
    found |= {"history": torch.empty(rows, history, dtype=torch.int32), "logprob_history": torch.empty(rows, history)}
    poison(found["history"], found["logprob_history"])
    return {name: None if found.get(name) is None else found[name].to(device) for name in ORDER}


def assert_same(left: dict[str, Tensor | None], right: dict[str, Tensor | None], rows: slice = slice(None)) -> None:
    for name in CHANGED:
        one, other = left[name], right[name]
        if one is None or other is None:
            assert one is other
        else:
            assert_bitwise_equal(one, other[rows])


TOKENS = st.lists(st.lists(st.integers(0, V - 1), min_size=8, max_size=8), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(st.lists(SAMPLINGS, min_size=1, max_size=6), TOKENS, st.sampled_from([8, 3]))
def test_steps_equal_the_oracle(device, samplings, steps, history):
    slots = slots_for(samplings)
    ours, theirs = (arguments(slots, device, history) for _ in range(2))
    for step, tokens in enumerate(steps):
        chosen = torch.tensor(tokens[: len(samplings)], device=device)
        logprobs = torch.arange(len(samplings), device=device) / -7.0 - step
        advance(chosen, logprobs, *ours.values())
        reference.advance(chosen, logprobs, *theirs.values())
        assert_same(ours, theirs)


@settings(max_examples=15, deadline=None)
@given(st.lists(SAMPLINGS, min_size=3, max_size=6), TOKENS, st.integers(0, 2**31))
def test_guided_steps_equal_the_oracle(device, samplings, steps, seed):
    slots, source, states, width = slots_for(samplings), torch.Generator().manual_seed(seed), 5, 4
    tables = torch.randint(0, 4, (2 * states * width, 2), generator=source, dtype=torch.int32)
    tables[:, 0] = torch.randint(0, states, (len(tables),), generator=source) * width  # next states
    tables[::width, 0] = torch.randint(0, 2, (2 * states,), generator=source)
    grammar = torch.arange(len(samplings)) % 3 - 1
    shared = {"grammar_base": torch.where(grammar < 0, -1, grammar * states * width), "grammar_class": grammar,
              "grammar_tables": tables,
              "grammar_classes": torch.randint(1, width, (2, V), generator=source, dtype=torch.int32)}  # fmt: skip
    shared = {name: tensor.to(device) for name, tensor in shared.items()}
    ours, theirs = (
        arguments(slots, device) | {"grammar_state": torch.zeros_like(grammar).to(device)} for _ in range(2)
    )
    for tokens in steps:
        chosen = torch.tensor(tokens[: len(samplings)], device=device)
        for step, state in ((advance, ours), (reference.advance, theirs)):
            given = {**state, **shared}
            step(chosen, -chosen.float(), **given)
        assert_same(ours, theirs)
        assert_bitwise_equal(ours["grammar_state"], theirs["grammar_state"])


@settings(max_examples=30, deadline=None)
@given(st.lists(SAMPLINGS, min_size=1, max_size=6), TOKENS)
def test_steps_equal_the_torch_backend(device, samplings, steps):
    slots = slots_for(samplings)
    ours = arguments(slots, device)
    for tokens in steps:
        chosen = torch.tensor(tokens[: len(samplings)])
        advance(chosen.to(device), None, *(ours | {"logprob_history": None, "context": None}).values())
        torch_backend.advance(slots, 0, chosen)
        slots.look()
        slots.hear()
    for row in range(len(samplings)):
        count = int(ours["generated"][row])
        found = int(ours["finish"][row]), int(ours["stop_reason"][row]), ours["history"][row, :count].tolist()
        answers = slots.answers
        text = answers.tokens[row, : answers.count[row]].tolist()
        assert found == (answers.finish[row], answers.stop_reason[row], text)
        assert ours["stop_state"][row] == slots.stop_state[row]
        assert ours["token"][row] == slots.token[row]
        if slots.output_counts is not None:
            assert torch.equal(ours["output_counts"][row].cpu(), slots.output_counts[row])


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100])
def test_a_row_does_not_depend_on_company(device, rows):
    samplings = [
        SamplingConfig(max_tokens=1 + row % 3, stop=["ab"] if row % 2 else None, stop_token_ids=[row % V],
                       presence_penalty=row % 5 / 10)
        for row in range(rows)
    ]  # fmt: skip
    slots = slots_for(samplings)
    before, once, again = (arguments(slots, device) for _ in range(3))
    tokens = torch.arange(rows, device=device) * 7 % V
    logprobs = -torch.rand(rows, generator=torch.Generator().manual_seed(0)).to(device)
    for state in (once, again):
        advance(tokens, logprobs, *state.values())
    assert_same(once, again)
    row = rows // 2
    here = slice(row, row + 1)
    shared = {"eos_token_ids", "automata"}
    alone = {k: v if v is None or k in shared else v[here].clone() for k, v in before.items()}
    advance(tokens[here], logprobs[here], *alone.values())
    assert_same(alone, once, here)


def decode_steps(device: torch.device, steps: int, graph: bool) -> dict[str, Tensor | None]:
    """`sample` and `advance` after one another on fixed logits; with `graph`, the first step captured and replayed."""
    samplings = [
        SamplingConfig(top_p=0.9, repetition_penalty=1.3, stop=["ab", "cc"], max_tokens=steps + 1, logprobs=0),
        SamplingConfig(temperature=0.0, frequency_penalty=0.5, min_tokens=3, stop_token_ids=[11], max_tokens=steps + 1),
        SamplingConfig(seed=4, top_k=20, logit_bias={7: 2.0}, max_tokens=steps - 2),
    ]
    slots = slots_for(samplings)
    state = arguments(slots, device, history=16)
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0)).to(device)
    wishes = {name: getattr(slots, name).to(device) for name in (
        "temperature", "top_k", "top_p", "min_p", "seed", "row_key", "sample", "bias_row", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "in_prompt")}  # fmt: skip
    shared = "generated", "min_tokens", "eos_token_ids", "stop_token_ids", "penalised", "output_counts"
    wishes |= {name: state[name] for name in shared}
    wishes |= {"biases": slots.biases.data.to(device), "wants_logprob": torch.ones(3, dtype=torch.bool, device=device),
               "processed_logprobs": torch.zeros(3, dtype=torch.bool, device=device)}  # fmt: skip

    def step() -> None:
        advance(*sample(logits, **wishes), *state.values())

    if graph:
        before = {name: state[name].clone() for name in CHANGED}
        step()  # compiles
        for name, tensor in before.items():
            state[name].copy_(tensor)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        step = captured.replay
    for _ in range(steps):
        step()
        if not graph:  # the torch backend takes the same steps; rows that have ended are left alone
            tokens, *_ = choose(logits.cpu().clone(), slots, 0)
            torch_backend.advance(slots, 0, tokens)
            for name in ("token", "generated", "finish", "stop_reason", "stop_state"):
                assert torch.equal(state[name].cpu(), getattr(slots, name)), name
    return state


def test_decoding_equals_the_torch_backends(device):
    state = decode_steps(device, 8, graph=False)
    assert len(set(state["finish"].tolist())) > 1


@pytest.mark.gpu
def test_decoding_can_be_captured_in_a_graph(device):
    assert_same(decode_steps(device, 8, graph=True), decode_steps(device, 8, graph=False))


def test_the_numbers_of_reasons_are_the_engines():
    for name in ("RUNNING", "EOS", "STOP_TOKEN", "STOP_STRING", "LENGTH", "WHOLE"):
        assert getattr(kernel, name) == getattr(engine_slots, name)


def test_automata_of_other_integers(device):
    slots = slots_for([SamplingConfig(stop=["ab"]), SamplingConfig()])
    wide, narrow = (arguments(slots, device) for _ in range(2))
    narrow["automata"] = narrow["automata"].to(torch.int16)
    for tokens in ([3, 4], [4, 3]):
        for state in (wide, narrow):
            advance(torch.tensor(tokens, device=device), None, *(state | {"logprob_history": None}).values())
    assert_same(wide, narrow)
    assert wide["finish"].tolist() == [engine_slots.STOP_STRING, engine_slots.RUNNING]


def test_custom_op_is_well_formed(device):
    slots = slots_for([SamplingConfig(stop=["ab"], presence_penalty=0.5), SamplingConfig()])
    tokens = torch.tensor([3, 4], device=device)
    torch.library.opcheck(advance.op, (tokens, tokens.float(), *arguments(slots, device).values()))
