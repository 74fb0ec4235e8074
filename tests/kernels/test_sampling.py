"""Tokens and log-probabilities, against the oracle and the torch backend's model/torch_sampler.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import make_batch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_checks import assert_bitwise_equal, assert_close, copied, poisoned_allocations, row_arguments
from torch import Tensor

from batchmix.engine.input_batch import InputBatch
from batchmix.kernels import reference
from batchmix.kernels.row_state import Flag, Number, Real, RowTensors, State
from batchmix.kernels.sampling import sample
from batchmix.models import torch_backend
from batchmix.models.backend import Logprobs
from batchmix.models.philox import uniform
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig

# numpy's, under the interpreter: a difference over a tiny temperature is meant to overflow.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in divide")


def slots_for(samplings: list[SamplingConfig], vocab: int, outputs: list[list[int]] | None = None) -> InputBatch:
    """On the CPU, one slot a row: prompts of tokens 5, 6, 7, and outputs [steps][rows] already chosen."""
    slots = make_batch(len(samplings), vocab, (2,), None)
    for row, sampling in enumerate(samplings):
        slots.add(Prompt(row, str(row), {}, [5 % vocab, 6 % vocab, 7 % vocab], sampling), 0, 1000)
    slots.upload()
    for tokens in outputs or []:
        torch_backend.post_update(torch.tensor(tokens) % vocab, slots.rows(len(tokens)))
    return slots


def wishes(slots: InputBatch, device: torch.device, first: int = 0, end: int | None = None) -> dict[str, Tensor | None]:
    """What `sample` takes beside the logits, of slots first..end-1."""
    rows = slots.rows(slots.capacity).narrow(slots.capacity if end is None else end, first)
    return row_arguments(sample, rows if device.type == "cpu" else copied(rows, device))


def run(logits: Tensor, slots: InputBatch, device: torch.device, first: int = 0) -> tuple[Tensor, Tensor]:
    logits = logits.to(device)
    before = logits.clone()
    with poisoned_allocations():
        tokens, logprobs = sample(logits, **wishes(slots, device, first, first + len(logits)))
    assert_bitwise_equal(logits, before)
    return tokens.cpu(), logprobs.cpu()


def choose(logits: Tensor, slots: InputBatch) -> tuple[Tensor, Logprobs | None, Tensor | None]:
    """The torch backend's; logits are changed in place."""
    return torch_backend.sample(logits, slots.rows(len(logits)), slots.host_rows(len(logits)))


def random_logits(seed: int, rows: int, vocab: int, spread: float = 3.0, ties: bool = False) -> Tensor:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    return logits.round() if ties else logits


SAMPLINGS = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 1e-38, 0.3, 1.0, 5.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, -1, 1, 2, 40, 270, 1000]),
    min_p=st.sampled_from([0.0, 0.02]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, -0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.sampled_from([None, {3: 3.0, 4: -100.0}]),
    allowed_token_ids=st.sampled_from([None, [2, 3, 4, 7]]),
    min_tokens=st.sampled_from([0, 1, 3]),
    stop_token_ids=st.sampled_from([None, [3], [1, 7, 6]]),
    logprobs=st.sampled_from([None, 0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


@pytest.mark.slow  # 8 s under the interpreter
@settings(max_examples=20, deadline=None)
@given(
    st.lists(SAMPLINGS, min_size=1, max_size=6),
    st.sampled_from([9, 31, 300, 2048, 2049]),
    st.integers(0, 2**31),
    st.booleans(),
    st.integers(0, 2),
)
def test_tokens_are_the_torch_backends(device, samplings, vocab, seed, ties, steps):
    slots = slots_for(samplings, vocab, [[3 + step + row for row in range(len(samplings))] for step in range(steps)])
    logits = random_logits(seed, len(samplings), vocab, ties=ties)
    tokens, logprobs = run(logits, slots, device)
    expected, wanted, _ = choose(logits.clone(), slots)
    assert tokens.tolist() == expected.tolist()
    asked = slots.num_logprobs >= 0
    assert (logprobs[~asked] == 0).all()
    if wanted is not None:
        assert_close(logprobs[asked], wanted.chosen)


@settings(max_examples=6, deadline=None)
@given(st.lists(SAMPLINGS, min_size=2, max_size=4), st.integers(0, 2**31))
def test_tokens_are_the_oracles(device, samplings, seed):
    slots = slots_for(samplings, 300, [[9] * len(samplings)])
    logits = random_logits(seed, len(samplings), 300)
    tokens, logprobs = run(logits, slots, device)
    expected, expected_logprobs = reference.sample(logits, **wishes(slots, torch.device("cpu")))
    assert tokens.tolist() == expected.tolist()
    assert_close(logprobs, expected_logprobs)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.2e-38, "top_p": 1.2e-38},
        {"temperature": 3e38, "min_p": 1.0},
        {"temperature": 1e-30, "logit_bias": {3: 1e30, 4: -1e30}, "repetition_penalty": 1e-6},
        {"top_p": 1.2e-38, "logit_bias": {5: 1e30}, "repetition_penalty": 1e6, "presence_penalty": 2.0},
    ],
)
def test_values_at_the_edges_of_float32_choose_the_torch_backends_tokens(device, values):
    slots = slots_for([SamplingConfig(**values)] * 2, 300, [[9, 5]])
    logits = random_logits(1, 2, 300)
    changed = logits.clone()
    expected, *_ = choose(changed, slots)
    assert changed.isfinite().all()
    assert run(logits, slots, device)[0].tolist() == expected.tolist()


def assert_logprobs_close(found: Tensor, expected: Tensor) -> None:
    """Each by itself. Among few tokens one may be all but certain: then what counts is how the sum near one is rounded, which
    a logarithm near zero shows whole."""
    roundings = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.double().cpu(), expected.double().cpu(), rtol=2e-5, atol=roundings)


def with_random_grammars(slots: InputBatch, seed: int, states: int = 4, classes: int = 3) -> RowTensors:
    """Two grammars of any needs, for two rows of three; in each state one class of tokens is allowed throughout."""
    source, vocab, count = torch.Generator().manual_seed(seed), slots.vocab_size, slots.capacity
    tables = torch.randint(0, 7, (2 * states * (1 + classes), 2), generator=source, dtype=torch.int32)
    tables[1 :: 1 + classes, 1] = 0
    token_class = torch.randint(1, 1 + classes, (2, vocab), generator=source, dtype=torch.int32)
    token_class[:, 0] = 1
    grammar = torch.arange(count) % 3 - 1
    rows = replace(copied(slots.rows(count), torch.device("cpu")), grammar_states=tables, grammar_classes=token_class)
    rows.state[State.GRAMMAR_STATE] = torch.randint(0, states, (count,), generator=source) * (1 + classes)
    rows.numbers[Number.GRAMMAR_BASE] = torch.where(grammar < 0, -1, grammar * states * (1 + classes))
    rows.numbers[Number.GRAMMAR_CLASS] = grammar
    rows.numbers[Number.MAX_TOKENS] = slots.generated + torch.randint(1, 5, (count,), generator=source)
    return rows


@settings(max_examples=6, deadline=None)
@given(st.lists(SAMPLINGS, min_size=2, max_size=4), st.integers(0, 2**31))
def test_grammars_are_the_oracles(device, samplings, seed):
    samplings = [replace(sampling, allowed_token_ids=None) for sampling in samplings]
    slots = slots_for(samplings, 300, [[9] * len(samplings)])
    slots.flags[Flag.PROCESSED_LOGPROBS] = torch.from_numpy(slots.num_logprobs < 0)
    logits, rows = random_logits(seed, len(samplings), 300), with_random_grammars(slots, seed)
    tokens, logprobs = sample(logits.to(device), **row_arguments(sample, copied(rows, device)))
    expected, expected_logprobs = reference.sample(logits, **row_arguments(sample, rows))
    assert tokens.tolist() == expected.tolist()
    assert_logprobs_close(logprobs, expected_logprobs)
    state, numbers = rows.state, rows.numbers
    for row, token in enumerate(tokens.tolist()):
        if numbers[Number.GRAMMAR_BASE, row] >= 0:
            kind = rows.grammar_classes[numbers[Number.GRAMMAR_CLASS, row], token]
            entry = numbers[Number.GRAMMAR_BASE, row] + state[State.GRAMMAR_STATE, row] + kind
            left = numbers[Number.MAX_TOKENS, row] - state[State.GENERATED, row]
            assert rows.grammar_states[entry, 1] < left


@settings(max_examples=5, deadline=None)
@example(
    [SamplingConfig(temperature=0.0), SamplingConfig(temperature=0.0, allowed_token_ids=[2, 3, 4, 7], min_tokens=3)],
    563,
)
@given(st.lists(SAMPLINGS, min_size=2, max_size=4), st.integers(0, 2**31))
def test_log_probabilities_among_what_is_allowed(device, samplings, seed):
    """By kernel, torch backend and oracle; bias, penalties and min_tokens say what is allowed, not how likely it is."""
    slots = slots_for([replace(sampling, logprobs=None) for sampling in samplings], 300, [[9] * len(samplings)])
    slots.flags[Flag.PROCESSED_LOGPROBS, 1:] = True
    slots.logprob_history = torch.zeros(len(samplings), 1)
    logits = random_logits(seed, len(samplings), 300)
    tokens, logprobs = run(logits, slots, device)
    expected, oracles = reference.sample(logits, **wishes(slots, torch.device("cpu")))
    chosen, none, found = choose(logits.clone(), slots)
    assert none is None
    assert tokens.tolist() == expected.tolist() == chosen.tolist()
    assert logprobs[0] == 0
    assert_logprobs_close(logprobs, oracles)
    assert found is not None
    assert_logprobs_close(found, oracles)


@pytest.mark.slow  # 10 s under the interpreter
@settings(max_examples=6, deadline=None)
@given(st.lists(SAMPLINGS, min_size=2, max_size=6), st.integers(0, 2**31))
def test_a_row_does_not_depend_on_company(device, samplings, seed):
    slots = slots_for(samplings, 300)
    slots.flags[Flag.PROCESSED_LOGPROBS] = torch.from_numpy(slots.num_logprobs < 0)
    logits = random_logits(seed, len(samplings), 300, ties=True)
    tokens, logprobs = run(logits, slots, device)
    again = run(logits, slots, device)
    assert_bitwise_equal(again[0], tokens)
    assert_bitwise_equal(again[1], logprobs)
    for row in range(len(samplings)):
        token, logprob = run(logits[row : row + 1], slots, device, first=row)
        assert_bitwise_equal(token, tokens[row : row + 1])
        assert_bitwise_equal(logprob, logprobs[row : row + 1])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5000))
def test_greedy_is_the_first_largest(device, seed, vocab):
    logits = torch.randint(0, 5, (3, vocab), generator=torch.Generator().manual_seed(seed)).float()
    tokens, _ = run(logits, slots_for([SamplingConfig(temperature=0.0)] * 3, vocab), device)
    assert tokens.tolist() == [int(np.argmax(row.numpy())) for row in logits]


def test_a_tiny_temperature_is_greedy(device):
    logits = random_logits(0, 4, 500, spread=10)
    samplings = [SamplingConfig(temperature=t) for t in (1e-45, 1e-38, 1e-20, 1e-4)]
    tokens, _ = run(logits, slots_for(samplings, 500), device)
    assert torch.equal(tokens, logits.argmax(-1))


def test_one_possible_token_is_taken(device):
    logits = torch.full((3, 400), float("-inf"))
    logits[[0, 1, 2], [399, 0, 123]] = torch.tensor([-1e30, 3e38, 0.0])
    samplings = [
        SamplingConfig(temperature=temperature, top_p=0.5, top_k=7, min_p=0.1, logprobs=0)
        for temperature in (0.0, 0.5, 9.0)
    ]
    tokens, logprobs = run(logits, slots_for(samplings, 400), device)
    assert tokens.tolist() == [399, 0, 123]
    assert logprobs.tolist() == [0, 0, 0]


def test_tokens_stay_inside_the_vocabulary_whatever_the_logits(device):
    logits = torch.full((6, 400), float("nan"))
    logits[2:4] = float("-inf")
    logits[4:] = float("inf")
    samplings = [SamplingConfig(temperature=t, top_p=0.5, top_k=7) for t in (0.0, 1.0)] * 3
    with np.errstate(all="ignore"):
        tokens, _ = run(logits, slots_for(samplings, 400), device)
    assert tokens[2:4].tolist() == [0, 0]  # as in the torch backend
    assert ((tokens >= 0) & (tokens < 400)).all()


@pytest.mark.parametrize("top_k", [299, 300, 301, 10**9])
def test_a_top_k_of_nearly_all(device, top_k):
    logits = random_logits(1, 1, 300, spread=1e-3)
    counted = set()
    for seed in range(4):
        slots = slots_for([SamplingConfig(top_k=top_k, top_p=1.0, seed=seed)], 300)
        tokens, _ = run(logits, slots, device)
        assert tokens.tolist() == choose(logits.clone(), slots)[0].tolist()
        counted.add(int(tokens))
    assert len(counted) > 1


def test_what_a_row_does_not_use_is_not_read(device):
    """Rows without penalties or bias next to tables full of NaN."""
    samplings = [SamplingConfig(temperature=t, top_p=0.9) for t in (0.0, 1.0)]
    logits = random_logits(2, 2, 300)
    expected = run(logits, slots_for(samplings, 300), device)[0]
    slots = slots_for([*samplings, SamplingConfig(presence_penalty=1.0, logit_bias={5: 1.0})], 300)
    assert slots.output_counts is not None
    assert slots.in_prompt is not None
    slots.biases.data.fill_(float("nan"))
    slots.output_counts.fill_(1000)
    slots.in_prompt.fill_(True)
    slots.reals[[Real.REPETITION_PENALTY, Real.PRESENCE_PENALTY, Real.FREQUENCY_PENALTY], :2] = float("nan")
    assert torch.equal(run(logits, slots, device)[0], expected)


@pytest.mark.slow  # 5 s and more
def test_a_real_vocabulary_and_a_row_stride(device):
    vocab = 32002
    wide = torch.full((2, vocab + 30), float("nan"))
    wide[:, 7 : 7 + vocab] = random_logits(3, 2, vocab)
    logits = wide[:, 7 : 7 + vocab]
    samplings = [
        SamplingConfig(top_p=0.95, top_k=5000, repetition_penalty=1.2, logprobs=0, seed=5),
        SamplingConfig(top_p=0.8, seed=6),
    ]
    slots = slots_for(samplings, vocab, [[31999, 5]])
    with poisoned_allocations():
        tokens, logprobs = sample(logits.to(device), **wishes(slots, device))
    expected, wanted, _ = choose(logits.clone(), slots)
    assert tokens.tolist() == expected.tolist()
    assert wanted is not None
    assert_close(logprobs[:1].cpu(), wanted.chosen)


@pytest.mark.slow  # 3 s under the interpreter
def test_draws_follow_the_softmax(device):
    """Chi-square of 300 rows; and each draw is where its random number falls in the running sum."""
    rows = 300
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    slots = slots_for([SamplingConfig(temperature=0.7, seed=9)] * rows, 5)
    tokens, _ = run(logits.expand(rows, 5).contiguous(), slots, device)
    probabilities = (logits.double() / 0.7).softmax(0)
    counts, expected = torch.bincount(tokens, minlength=5), probabilities * rows
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # 99.9th percentile for 4 degrees of freedom
    seeds, row_keys, samples = slots.numbers[[Number.SEED, Number.ROW_KEY, Number.SAMPLE]]
    u = uniform(seeds, row_keys, samples, slots.generated)
    assert torch.equal(tokens, (u[:, None] >= probabilities.cumsum(0)).sum(1))


def test_positions_seeds_and_samples_change_the_draw(device):
    base = SamplingConfig(seed=1)
    logits = random_logits(4, 1, 1000, spread=0.1)
    found = set()
    for change in (None, Number.SEED, State.GENERATED, Number.SAMPLE, Number.ROW_KEY):
        slots = slots_for([replace(base, seed=2) if change is Number.SEED else base], 1000)
        if change is not None and change is not Number.SEED:
            (slots.state if isinstance(change, State) else slots.numbers)[change, 0] += 1
        found.add(int(run(logits, slots, device)[0]))
    assert len(found) == 5


def test_no_rows(device):
    tokens, logprobs = sample(torch.empty(0, 50, device=device), **wishes(slots_for([], 50), device))
    assert tokens.shape == logprobs.shape == (0,)


def test_custom_op_is_well_formed(device):
    slots = slots_for([SamplingConfig(temperature=0.0, presence_penalty=1.0)] * 2, 9)
    rest = row_arguments(sample, copied(with_random_grammars(slots, 1), device))
    torch.library.opcheck(sample.op, (random_logits(0, 2, 9).to(device), *rest.values()))
