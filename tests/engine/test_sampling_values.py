"""Sampling values at the edges of float32: refused in one line, or tokens are chosen as ever."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engines import make_batch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchmix.config import Config
from batchmix.config_checks import check
from batchmix.errors import BatchmixError
from batchmix.models.torch_sampler import post_update, sample
from batchmix.prompts.stop_strings import build_stop_table
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig
from batchmix.sampling_checks import check_sampling, override_sampling

V = 300
REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
FLOAT32 = np.finfo(np.float32)
SMALL = (FLOAT32.smallest_subnormal, FLOAT32.tiny)
EDGES = [
    sign * near
    for edge in (0.0, 1e-46, 1e-6, *map(float, SMALL), 1e-30, 0.5, 1.0, 2.0, 1e6, 1e30, float(FLOAT32.max), 1e39)
    for near in (edge, math.nextafter(edge, 0), math.nextafter(edge, math.inf))
    for sign in (1, -1)
] + [math.inf, -math.inf, math.nan, 5e-324, 1.7976931348623157e308]
VALUES = st.one_of(st.sampled_from(EDGES), st.floats(), st.floats(width=32), st.floats(0, 3))
INTEGERS = st.one_of(st.integers(), st.integers(-2, 400), st.sampled_from([2**31 - 1, 2**31, 2**63, -(2**63), 2**64]))


def chosen(sampling: SamplingConfig, logits: torch.Tensor, steps: int) -> list[list[int]]:
    """The tokens of every row; each row has the same wishes, and each step sees what the ones before chose."""
    slots = make_batch(
        len(logits), V, (2,), lambda s: build_stop_table(s.stop or [], [b"a"] * V, drops_leading_space=False)
    )
    for row in range(len(logits)):
        slots.add(Prompt(row, str(row), {}, [5, 6, 7], sampling), 0, sampling.max_tokens)
    slots.upload()
    rows, host = slots.rows(len(logits)), slots.host_rows(len(logits))
    found = []
    for _ in range(steps):
        changed = logits.clone()
        tokens, *_ = sample(changed, rows, host)
        assert not changed.isnan().any(), sampling
        assert (changed < math.inf).all(), sampling
        assert (changed.gather(1, tokens[:, None]) > -math.inf).all(), "a token that was not to be chosen"
        found.append(tokens.tolist())
        post_update(tokens, rows)
    return found


def accepted(values: dict[str, Any]) -> SamplingConfig | None:
    """A row's sampling with these values, None where it is refused."""
    reason = None
    try:
        return override_sampling(SamplingConfig(max_tokens=1000), values)
    except ValueError as error:
        reason = str(error)
    assert "\n" not in reason
    assert any(key in reason for key in values)
    return None


def logits_of(seed: int, spread: float) -> torch.Tensor:
    """Random ones, one row of them all alike, and one with a token far from the others."""
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(seed)) * spread
    logits[1] = spread
    logits[2, seed % V] = 40 * spread
    return logits


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(REALS), VALUES, min_size=1), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 50.0])
)
@example({"top_p": 1e-46}, 0, 1.0)
@example({"repetition_penalty": 1e-6, "presence_penalty": -2.0}, 0, 1000.0)
@example({"temperature": 1e-40}, 0, 1.0)
@example({"temperature": 2e-38, "top_p": 2e-38, "min_p": 1.0}, 0, 50.0)
def test_reals_at_the_edges_are_refused_or_leave_tokens_to_choose(values, seed, spread):
    sampling = accepted(values)
    if sampling is not None:
        chosen(sampling, logits_of(seed, spread), 2)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.integers(0, V - 1), VALUES, min_size=1, max_size=4),
    st.sampled_from([1e-6, 0.5, 1.0, 1e6]),
    st.integers(0, 99),
)
@example({5: 1e39}, 1.0, 0)
@example({5: -1e39}, 1.0, 0)
@example({5: 1e30, 6: -1e30}, 1e-6, 0)
def test_biases_are_refused_or_leave_finite_logits(bias, penalty, seed):
    sampling = accepted({"logit_bias": bias})
    if sampling is not None:
        sampling = replace(sampling, repetition_penalty=penalty, temperature=0.5)
        assert all(math.isfinite(np.float32(value)) for value in (sampling.logit_bias or {}).values())
        chosen(sampling, logits_of(seed, 1.0), 2)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["max_tokens", "min_tokens", "top_k", "seed", "n", "logprobs"]), st.one_of(INTEGERS, VALUES))
def test_integers_beyond_what_the_device_has_are_refused(key, value):
    sampling = accepted({key: value})
    if sampling is not None:
        chosen(replace(sampling, logprobs=min(sampling.logprobs or 0, V)), logits_of(0, 1.0), 1)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"top_p": 1e-46}, "sampling.top_p=1e-46 is no number of float32"),
        ({"temperature": 1e-40}, "sampling.temperature=1e-40 is no number of float32"),
        ({"temperature": 1e39}, "sampling.temperature=1e+39 is no number of float32"),
        ({"min_p": 1e-300}, "sampling.min_p=1e-300 is no number of float32"),
        ({"repetition_penalty": 1e-7}, "sampling.repetition_penalty=1e-07 must be at least 1e-06"),
        ({"repetition_penalty": 1e38}, "sampling.repetition_penalty=1e+38 must be at least 1e-06 and at most 1000000.0"),
        ({"logit_bias": {5: 1e39}}, "sampling.logit_bias has 1e+39 for token 5; at most 1e+30 either way"),
        ({"stop_token_ids": list(range(1025))}, "sampling.stop_token_ids has more than 1,024 tokens"),
        ({"structured_outputs": {"json": {"const": b"x"}}}, "is no JSON: Object of type bytes"),
    ],
)  # fmt: skip
def test_a_value_that_float32_has_not_is_named(values, reason):
    with pytest.raises(ValueError, match="sampling") as row:
        override_sampling(SamplingConfig(), values)
    assert reason in str(row.value)
    if "structured_outputs" not in values:
        with pytest.raises(BatchmixError) as job:
            check(Config(sampling=SamplingConfig(**values)))
        assert reason in str(job.value)


def test_the_smallest_values_are_used_as_they_are():
    """A top_p that hardly leaves anything leaves the most likely token, and so does a temperature near zero."""
    logits = logits_of(3, 1.0)
    best = [logits.argmax(-1).tolist()]
    for values in ({"top_p": 1.2e-38}, {"temperature": 1.2e-38}):
        assert chosen(check_sampling(SamplingConfig(**values)), logits, 1)[0][::2] == best[0][::2]
