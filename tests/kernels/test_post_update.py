"""A token's effect on its row, against the oracle and the torch backend's model/torch_sampler.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engines import make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_bitwise_equal, copied, poison, row_arguments, tensors_of

from batchmix.engine.input_batch import InputBatch
from batchmix.kernels import reference
from batchmix.kernels.post_update import post_update
from batchmix.kernels.row_state import Finish, Flag, Number, RowTensors, State
from batchmix.kernels.sampling import sample
from batchmix.models import torch_backend
from batchmix.prompts.stop_strings import build_stop_table
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig

V = 40
PIECES = [b"", b"", b""] + [bytes([97 + i % 4]) * (1 + i // 4 % 3) for i in range(V - 3)]
CHANGED = ["state", "history", "logprob_history", "output_counts"]

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
    slots = make_batch(
        len(samplings), V, (2, 9), lambda s: build_stop_table(s.stop or [], PIECES, drops_leading_space=False)
    )
    for row, sampling in enumerate(samplings):
        slots.add(Prompt(row, str(row), {}, [5, 6, 7], sampling), 0, sampling.max_tokens)
    slots.upload()
    return slots


def rows_of(slots: InputBatch, device: torch.device, history: int = 8, logprobs: bool = True) -> RowTensors:
    """A copy of the slots' rows on the device, with other histories, to which nothing has been written."""
    rows, count = copied(slots.rows(slots.capacity), device), slots.capacity
    histories = torch.empty(count, history, dtype=torch.int32), torch.empty(count, history)
    poison(*histories)
    tokens, probabilities = (history.to(device) for history in histories)
    return replace(rows, history=tokens, logprob_history=probabilities if logprobs else None)


def assert_same(left: RowTensors, right: RowTensors) -> None:
    for name in CHANGED:
        one, other = getattr(left, name), getattr(right, name)
        if one is None or other is None:
            assert one is other
        else:
            assert_bitwise_equal(one, other)


TOKENS = st.lists(st.lists(st.integers(0, V - 1), min_size=8, max_size=8), min_size=1, max_size=8)


@settings(max_examples=15, deadline=None)
@given(st.lists(SAMPLINGS, min_size=1, max_size=6), TOKENS, st.sampled_from([8, 3]))
def test_steps_equal_the_oracle(device, samplings, steps, history):
    slots = slots_for(samplings)
    ours, theirs = (rows_of(slots, device, history) for _ in range(2))
    for step, tokens in enumerate(steps):
        chosen = torch.tensor(tokens[: len(samplings)], device=device)
        logprobs = torch.arange(len(samplings), device=device) / -7.0 - step
        post_update(chosen, logprobs, **row_arguments(post_update, ours))
        reference.post_update(chosen, logprobs, **row_arguments(post_update, theirs))
        assert_same(ours, theirs)


@settings(max_examples=8, deadline=None)
@given(st.lists(SAMPLINGS, min_size=3, max_size=6), TOKENS, st.integers(0, 2**31))
def test_guided_steps_equal_the_oracle(device, samplings, steps, seed):
    slots, source, states, width = slots_for(samplings), torch.Generator().manual_seed(seed), 5, 4
    tables = torch.randint(0, 4, (2 * states * width, 2), generator=source, dtype=torch.int32)
    tables[:, 0] = torch.randint(0, states, (len(tables),), generator=source) * width  # next states
    tables[::width, 0] = torch.randint(0, 2, (2 * states,), generator=source)
    grammar = torch.arange(len(samplings)) % 3 - 1
    slots.numbers[Number.GRAMMAR_BASE] = torch.where(grammar < 0, -1, grammar * states * width)
    slots.numbers[Number.GRAMMAR_CLASS] = grammar
    grammars = {"grammar_states": tables.to(device),
                "grammar_classes": torch.randint(1, width, (2, V), generator=source, dtype=torch.int32).to(device)}  # fmt: skip
    ours, theirs = (replace(rows_of(slots, device), **grammars) for _ in range(2))
    for tokens in steps:
        chosen = torch.tensor(tokens[: len(samplings)], device=device)
        for step, rows in ((post_update, ours), (reference.post_update, theirs)):
            step(chosen, -chosen.float(), **row_arguments(post_update, rows))
        assert_same(ours, theirs)


@settings(max_examples=15, deadline=None)
@given(st.lists(SAMPLINGS, min_size=1, max_size=6), TOKENS)
def test_steps_equal_the_torch_backend(device, samplings, steps):
    slots = slots_for(samplings)
    ours = rows_of(slots, device, logprobs=False)
    for tokens in steps:
        chosen = torch.tensor(tokens[: len(samplings)])
        post_update(chosen.to(device), None, **row_arguments(post_update, ours))
        torch_backend.post_update(chosen, slots.rows(len(samplings)))
        slots.record_step()
        step = slots.pending.popleft()
        slots.outputs.append(step.slots, *step.event())
    assert_bitwise_equal(ours.state.cpu(), slots.state)
    for row, (count, finish, reason) in enumerate(ours.state[State.GENERATED : State.STOP_REASON + 1].T.tolist()):
        answers = slots.outputs
        text = answers.tokens[row, : answers.count[row]].tolist()
        assert (finish, reason) == (answers.finish[row], answers.stop_reason[row])
        assert ours.history[row, :count].tolist() == text
        if slots.output_counts is not None:
            assert torch.equal(ours.output_counts[row].cpu(), slots.output_counts[row])


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100])
def test_a_row_does_not_depend_on_company(device, rows):
    samplings = [
        SamplingConfig(max_tokens=1 + row % 3, stop=["ab"] if row % 2 else None, stop_token_ids=[row % V],
                       presence_penalty=row % 5 / 10)
        for row in range(rows)
    ]  # fmt: skip
    slots = slots_for(samplings)
    alone, once, again = (rows_of(slots, device) for _ in range(3))
    tokens = torch.arange(rows, device=device) * 7 % V
    logprobs = -torch.rand(rows, generator=torch.Generator().manual_seed(0)).to(device)
    for state in (once, again):
        post_update(tokens, logprobs, **row_arguments(post_update, state))
    assert_same(once, again)
    row = rows // 2
    here = slice(row, row + 1)
    before = copied(alone, device)
    post_update(tokens[here], logprobs[here], **row_arguments(post_update, alone.narrow(row + 1, row)))
    assert_same(alone.narrow(row + 1, row), once.narrow(row + 1, row))
    for others in ((row, 0), (rows, row + 1)):  # of which a step of some rows leaves alone what lies beside them
        assert_same(alone.narrow(*others), before.narrow(*others))


def decode_steps(device: torch.device, steps: int, graph: bool) -> RowTensors:
    """`sample` and `post_update` after one another on fixed logits; with `graph`, the first step captured and replayed."""
    samplings = [
        SamplingConfig(top_p=0.9, repetition_penalty=1.3, stop=["ab", "cc"], max_tokens=steps + 1, logprobs=0),
        SamplingConfig(temperature=0.0, frequency_penalty=0.5, min_tokens=3, stop_token_ids=[11], max_tokens=steps + 1),
        SamplingConfig(seed=4, top_k=20, logit_bias={7: 2.0}, max_tokens=steps - 2),
    ]
    slots = slots_for(samplings)
    rows = rows_of(slots, device, history=16)
    rows.flags[Flag.WANTS_LOGPROB] = True
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        post_update(*sample(logits, **row_arguments(sample, rows)), **row_arguments(post_update, rows))

    if graph:
        before = copied(rows, device)
        step()  # compiles
        for name in CHANGED:
            getattr(rows, name).copy_(getattr(before, name))
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        step = captured.replay
    for _ in range(steps):
        step()
        if not graph:  # the torch backend takes the same steps; rows that have ended are left alone
            theirs = slots.rows(3)
            tokens, *_ = torch_backend.sample(logits.cpu().clone(), theirs, slots.host_rows(3))
            torch_backend.post_update(tokens, theirs)
            assert torch.equal(rows.state.cpu(), slots.state)
    return rows


@pytest.mark.slow  # seconds under the interpreter, or of processes
def test_decoding_equals_the_torch_backends(device):
    rows = decode_steps(device, 8, graph=False)
    assert len(set(rows.state[State.FINISH].tolist())) > 1


@pytest.mark.gpu
def test_decoding_can_be_captured_in_a_graph(device):
    assert_same(decode_steps(device, 8, graph=True), decode_steps(device, 8, graph=False))


def test_automata_of_other_integers(device):
    slots = slots_for([SamplingConfig(stop=["ab"]), SamplingConfig()])
    wide, narrow = (rows_of(slots, device, logprobs=False) for _ in range(2))
    narrow = replace(narrow, automata=narrow.automata.to(torch.int16))
    for tokens in ([3, 4], [4, 3]):
        for rows in (wide, narrow):
            post_update(torch.tensor(tokens, device=device), None, **row_arguments(post_update, rows))
    assert_same(wide, narrow)
    assert wide.state[State.FINISH].tolist() == [Finish.STOP_STRING, Finish.RUNNING]


def test_a_narrowed_block_is_the_same_memory() -> None:
    rows = slots_for([SamplingConfig(presence_penalty=0.5)] * 3).rows(3)
    some = tensors_of(rows.narrow(3, 1))
    assert {name for name, tensor in some.items() if 2 in tensor.shape} >= {
        "state", "numbers", "reals", "flags", "stop_token_ids", "output_counts", "in_prompt", "history",
    }  # fmt: skip
    for name, tensor in tensors_of(rows).items():
        assert some[name].untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_custom_op_is_well_formed(device):
    slots = slots_for([SamplingConfig(stop=["ab"], presence_penalty=0.5), SamplingConfig()])
    tokens = torch.tensor([3, 4], device=device)
    rows = row_arguments(post_update, rows_of(slots, device))
    torch.library.opcheck(post_update.op, (tokens, tokens.float(), *rows.values()))
