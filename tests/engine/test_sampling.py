"""From logits to tokens, against plain-Python references."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.engine.input_batch import InputBatch
from batchmix.kernels.row_state import Finish, Number, State
from batchmix.models.backend import Logprobs
from batchmix.models.philox import row_key
from batchmix.models.torch_sampler import _buckets, _draw, _filter, post_update, sample
from batchmix.prompts.stop_strings import build_stop_table
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig

V = 300
PIECES = [b"", b"", b""] + [bytes([97 + i % 26]) * (1 + i // 26 % 3) for i in range(V - 3)]


def slots_for(*samplings: SamplingConfig, vocab: int = V) -> InputBatch:
    slots = make_batch(
        len(samplings), vocab, (2,), lambda s: build_stop_table(s.stop or [], PIECES, drops_leading_space=False)
    )
    for row, sampling in enumerate(samplings):
        slots.add(Prompt(row, str(row), {}, [5, 6, 7], sampling), 0, sampling.max_tokens)
    slots.upload()
    return slots


def choose(logits: torch.Tensor, slots: InputBatch) -> tuple[torch.Tensor, Logprobs | None, torch.Tensor | None]:
    """The next token of the first slots; logits are changed in place."""
    return sample(logits, slots.rows(len(logits)), slots.host_rows(len(logits)))


def append(slots: InputBatch, *tokens: int) -> None:
    """One token to each of the first slots."""
    post_update(torch.tensor(tokens), slots.rows(len(tokens)))


def kept_tokens(logits: list[float], top_p: float, top_k: int, min_p: float) -> set[int]:
    """The tokens that may be drawn, one rule after the other over all of the vocabulary."""
    top = max(logits)
    weights = {token: math.exp(np.float32(x) - np.float32(top)) for token, x in enumerate(logits)}
    left = {token for token, weight in weights.items() if weight >= min_p}
    if top_k > 0:
        least = sorted((weights[token] for token in left), reverse=True)[:top_k][-1]
        left = {token for token in left if weights[token] >= least}
    if top_p < 1:
        order = sorted(left, key=lambda token: -weights[token])
        mass, total, before = 0.0, sum(weights[token] for token in left), []
        for token in order:
            if mass >= top_p * total:
                break
            before.append(token)
            mass += weights[token]
        left = {token for token in left if weights[token] >= weights[before[-1]]}
    return left


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1.0, 0.9, 0.5, 0.1]),
    st.sampled_from([0, -1, 1, 2, 50, 299, 1000]),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    st.sampled_from([0.1, 1.0, 5.0]),
)
def test_top_p_top_k_min_p_keep_what_the_definition_keeps(seed, top_p, top_k, min_p, spread):
    logits = (torch.randn(1, V, generator=torch.Generator().manual_seed(seed)) * spread).double().float()
    sampling = SamplingConfig(temperature=1.0, top_p=top_p, top_k=top_k, min_p=min_p)
    weights = _filter(logits - logits.amax(-1, keepdim=True), slots_for(sampling).rows(1), torch.tensor([0]))
    kept = set(torch.nonzero(weights[0])[:, 0].tolist())
    expected = kept_tokens(logits[0].tolist(), top_p, top_k, min_p)
    ranked = logits[0].sort(descending=True).values
    # Where the running mass meets top_p within rounding, one token more or less is right too.
    assert len(kept ^ expected) <= 1 if top_p < 1 else kept == expected, ranked[:5]


def test_a_flat_distribution_over_a_large_vocabulary_is_cut_right():
    vocab = 5000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)) * 0.01
    slots = slots_for(SamplingConfig(top_p=0.9), vocab=vocab)
    weights = _filter(logits - logits.amax(-1, keepdim=True), slots.rows(1), torch.tensor([0]))
    probabilities = logits[0].double().softmax(0)
    kept = probabilities[weights[0] > 0]
    assert 0.9 <= kept.sum() < 0.9 + 2 * probabilities.max()


def test_draws_follow_the_softmax():
    rows = 4000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5]).repeat(1, 1)
    slots = slots_for(*[SamplingConfig(temperature=0.7, seed=9)] * rows, vocab=5)
    tokens, *_ = choose(logits.expand(rows, 5).clone(), slots)
    expected = (logits[0] / 0.7).softmax(0) * rows
    counts = torch.bincount(tokens, minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # 99.9th percentile for 4 degrees of freedom


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 2000))
def test_greedy_is_the_first_largest(seed, vocab):
    logits = torch.randint(0, 5, (3, vocab), generator=torch.Generator().manual_seed(seed)).float()
    slots = slots_for(*[SamplingConfig(temperature=0.0)] * 3, vocab=vocab)
    slots.eos_token_ids = slots.eos_token_ids[:0]
    tokens, *_ = choose(logits.clone(), slots)
    assert tokens.tolist() == [int(np.argmax(row.numpy())) for row in logits]


def test_penalties():
    sampling = SamplingConfig(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5)
    slots = slots_for(sampling, SamplingConfig(temperature=0.0))
    for token in (10, 10, 11):
        append(slots, token, token)
    before = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    choose(after, slots)
    expected = before[0].clone()
    for token in (5, 6, 7, 10, 11):  # the prompt's and the output's
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token, count in Counter([10, 10, 11]).items():
        expected[token] -= 0.5 * count + 0.25
    assert torch.allclose(after[0], expected)
    assert torch.equal(after[1], before[1])


def test_bias_allowed_tokens_and_min_tokens():
    logits = torch.zeros(4, V)
    logits[:, 2] = 9  # end of sequence
    logits[:, 50] = 5
    slots = slots_for(
        SamplingConfig(temperature=0.0, logit_bias={7: 100.0}),
        SamplingConfig(temperature=0.0, allowed_token_ids=[30, 31]),
        SamplingConfig(temperature=0.0, min_tokens=1, stop_token_ids=[50]),
        SamplingConfig(temperature=0.0),
    )
    tokens, *_ = choose(logits, slots)
    assert tokens[0] == 7
    assert tokens[1] in (30, 31)
    assert tokens[2] not in (2, 50)
    assert tokens[3] == 2


def test_logprobs_are_the_models_own():
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    slots = slots_for(
        SamplingConfig(temperature=0.0, logprobs=3, logit_bias={9: 50.0}),
        SamplingConfig(temperature=0.0),
        SamplingConfig(temperature=0.0, logprobs=0),
    )
    tokens, found, _ = choose(logits.clone(), slots)
    expected = logits.log_softmax(-1)
    assert found is not None
    assert found.rows.tolist() == [0, 2]
    assert tokens[0] == 9
    assert torch.allclose(found.chosen, expected[[0, 2], tokens[[0, 2]]])
    assert torch.allclose(found.top[0], expected[0].topk(3).values)


def test_tied_logprobs_do_not_depend_on_company():
    logits = torch.randint(0, 8, (1, V), generator=torch.Generator().manual_seed(0)).float()
    few, many = SamplingConfig(temperature=0.0, logprobs=3), SamplingConfig(temperature=0.0, logprobs=60)
    _, alone, _ = choose(logits.clone(), slots_for(few))
    _, together, _ = choose(logits.repeat(3, 1), slots_for(few, many, SamplingConfig(temperature=0.0)))
    assert alone is not None
    assert together is not None
    assert torch.equal(alone.top_ids[0], together.top_ids[0, :3])
    assert torch.equal(alone.top[0], together.top[0, :3])
    assert together.top.shape == (2, 60)


def test_a_top_p_on_the_edge_of_a_token_does_not_depend_on_company():
    vocab, generator = 3000, torch.Generator().manual_seed(0)
    for _ in range(60):
        logits = torch.randn(1, vocab, generator=generator) * 0.3
        logits -= logits.amax()
        best = logits[0].exp().sort(descending=True).values.double()
        kept, edge = 900, int(torch.randint(50, 500, (1,), generator=generator))
        row = SamplingConfig(
            min_p=float(best[kept].float()), top_p=float(best[: edge + 1].sum() / best[: kept + 1].sum())
        )
        alone = _filter(logits.clone(), slots_for(row, vocab=vocab).rows(1), torch.tensor([0]))
        slots = slots_for(row, SamplingConfig(top_k=2999), vocab=vocab)
        together = _filter(logits.repeat(2, 1), slots.rows(2), torch.tensor([0, 1]))
        assert torch.equal(alone[0], together[0])
        assert abs(int((alone > 0).sum()) - edge - 1) <= 1


@pytest.mark.parametrize("top_k", [255, 256, 257, 2047, 2500, 2999])
def test_a_top_k_beyond_the_first_candidates(top_k):
    vocab = 3000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(3))
    logits -= logits.amax()
    for top_p in (1.0, 0.95):
        slots = slots_for(SamplingConfig(top_k=top_k, top_p=top_p), vocab=vocab)
        weights = _filter(logits.clone(), slots.rows(1), torch.tensor([0]))
        expected = kept_tokens(logits[0].tolist(), top_p, top_k, 0.0)
        assert set(torch.nonzero(weights[0])[:, 0].tolist()) == expected


SAMPLINGS = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 1e-38, 0.3, 1.0, 5.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 1, 40, 270, 1000]),
    min_p=st.sampled_from([0.0, 0.02]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.sampled_from([None, {7: 3.0, 8: -100.0}]),
    allowed_token_ids=st.sampled_from([None, [2, 3, 7, 8, 200]]),
    min_tokens=st.sampled_from([0, 3]),
    logprobs=st.sampled_from([None, 0, 2, 7]),
    seed=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(SAMPLINGS, min_size=2, max_size=6), st.integers(0, 2**31), st.booleans())
def test_what_others_ask_for_never_changes_a_row(samplings, seed, ties):
    logits = torch.randn(len(samplings), V, generator=torch.Generator().manual_seed(seed)) * 2
    if ties:
        logits = logits.round()
    tokens, found, _ = choose(logits.clone(), slots_for(*samplings))
    places = [] if found is None else found.rows.tolist()
    for row, sampling in enumerate(samplings):
        slots = slots_for(sampling)
        slots.numbers[Number.ROW_KEY, 0] = row_key(str(row))
        token, alone, _ = choose(logits[row : row + 1].clone(), slots)
        assert token[0] == tokens[row]
        assert (alone is not None) == (row in places)
        if alone is not None and found is not None:
            place, k = places.index(row), sampling.logprobs
            assert torch.equal(alone.chosen[0], found.chosen[place])
            assert torch.equal(alone.top_ids[0], found.top_ids[place, :k])
            assert torch.equal(alone.top[0], found.top[place, :k])


def test_a_tiny_temperature_is_greedy():
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(0)) * 10
    samplings = [SamplingConfig(temperature=t) for t in (1e-45, 1e-38, 1e-20, 1e-4)]
    tokens, *_ = choose(logits.clone(), slots_for(*samplings))
    assert torch.equal(tokens, logits.argmax(-1))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 700), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_draws_invert_the_running_sum(seed, vocab, u):
    weights = torch.randint(0, 4, (1, vocab), generator=torch.Generator().manual_seed(seed)).float()  # sums are exact
    weights[0, seed % vocab] = 1.0
    token = int(_draw(weights, torch.tensor([u], dtype=torch.float64))[0])
    running = weights[0].double().cumsum(0)
    assert token == int((running <= u * running[-1]).sum())
    assert weights[0, token] > 0


def test_whole_buckets_are_no_copy_of_the_logits():
    whole, ragged = torch.randn(3, 256), torch.randn(3, 130)
    assert _buckets(whole, 0.0).data_ptr() == whole.data_ptr()
    assert torch.equal(_buckets(ragged, -1.0).flatten(1), torch.cat((ragged, torch.full((3, 126), -1.0)), 1))


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}, {"top_p": 0.9999, "top_k": 290}])
def test_rows_that_are_all_sampled_need_no_copy_of_the_logits_and_choose_as_among_others(sampling):
    logits = torch.randn(8, V, generator=torch.Generator().manual_seed(0)) * 3
    drawn = [SamplingConfig(temperature=1.0, seed=row, **sampling) for row in range(7)]
    alone = logits[:7].clone()
    tokens, *_ = choose(alone, slots_for(*drawn))
    assert not torch.equal(alone, logits[:7]), "modified in place"
    among, *_ = choose(logits.clone(), slots_for(*drawn, SamplingConfig(temperature=0.0)))
    assert torch.equal(among[:7], tokens)


def test_draws_at_the_very_ends_are_possible_tokens():
    weights = torch.zeros(1, 1000)
    weights[0, [300, 301, 700]] = torch.tensor([0.3, 1e-30, 0.7])
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert _draw(weights.repeat(2, 1), ends).tolist() == [300, 700]


def run_tokens(sampling: SamplingConfig, tokens: list[int]) -> tuple[int, int, int]:
    """(why, reason, number of tokens) when these tokens are chosen one after the other."""
    slots = slots_for(sampling)
    for count, token in enumerate(tokens, 1):
        append(slots, token)
        if slots.finish[0] != Finish.RUNNING:
            return int(slots.finish[0]), int(slots.state[State.STOP_REASON, 0]), count
    return Finish.RUNNING, 0, len(tokens)


def test_why_rows_end():
    base = SamplingConfig(max_tokens=4)
    assert run_tokens(base, [9, 9, 2]) == (Finish.EOS, 0, 3)
    assert run_tokens(replace(base, ignore_eos=True), [2, 2, 2, 2])[::2] == (Finish.LENGTH, 4)
    assert run_tokens(replace(base, stop_token_ids=[8, 9]), [7, 9]) == (Finish.STOP_TOKEN, 9, 2)
    assert run_tokens(base, [7, 7, 7, 7])[::2] == (Finish.LENGTH, 4)
    assert run_tokens(base, [7, 7, 7, 2])[0] == Finish.EOS  # both at once: it ended of itself


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(3, 90), min_size=1, max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3, unique=True),
    st.integers(0, 5),
)
def test_stop_strings_end_a_row_where_its_text_contains_one(tokens, stop, min_tokens):
    sampling = SamplingConfig(max_tokens=100, stop=stop, min_tokens=min_tokens)
    text, expected = b"", (Finish.RUNNING, len(tokens))
    for count, token in enumerate(tokens, 1):
        if count > min_tokens:
            text += PIECES[token]
        if any(string.encode() in text for string in stop):
            expected = (Finish.STOP_STRING, count)
            break
    assert run_tokens(sampling, tokens)[::2] == expected


def test_a_freed_slot_takes_everything_of_the_last_row():
    samplings = [SamplingConfig(temperature=0.1 * i, stop=["a" * (i + 1)], stop_token_ids=list(range(60, 61 + i)),
                                logit_bias={i: 1.0}, presence_penalty=0.1, logprobs=i) for i in range(3)]  # fmt: skip
    slots = slots_for(*samplings)
    append(slots, 10, 11, 12)
    last = {name: field[2].clone() if isinstance(field, torch.Tensor) else field[2].copy()
            for name, field in vars(slots).items() if isinstance(field, torch.Tensor | np.ndarray)
            and len(field) == 3 and name[0] != "_" and name != "history"}  # fmt: skip
    blocks = {name: getattr(slots, name)[:, 2].clone() for name in ("state", "numbers", "reals", "flags")}
    assert len(last) > 10
    assert sum(map(len, blocks.values())) > 20
    slots.remove(0, samplings[0])
    slots.upload()
    assert slots.num_active == 2
    for name, value in last.items():
        assert np.array_equal(getattr(slots, name)[0], value), name
    for name, value in blocks.items():
        assert torch.equal(getattr(slots, name)[:, 0], value), name


def test_stop_strings_need_a_tokenizer():
    slots = make_batch(1, V, (2,), None)
    with pytest.raises(AssertionError, match="no tokenizer"):
        slots.add(Prompt(0, "0", {}, [5], SamplingConfig(stop=["x"])), 0, 5)
