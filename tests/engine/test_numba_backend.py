"""Whole runs on the numba backend: transformers' and the torch backend's tokens, whatever other rows are in the batch."""

from __future__ import annotations

import random

import pytest
import torch
from checkpoints import random_mixtral, save_hub
from engines import answers, load, make_engine, prompts, run, threads

from batchmix.models.numba_ops import NumbaOperators

SAMPLED = {"temperature": 1.0, "top_p": 0.95, "logprobs": 2, "max_tokens": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hub(random_mixtral(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, operators=NumbaOperators(torch.float32))


def test_greedy_tokens_are_the_torch_backends(folder, model):
    rows = prompts(60, 512, seed=1, longest=60, max_tokens=12)
    theirs, ours = (run(make_engine(one), rows) for one in (load(folder), model))
    assert {key: list(row.token_ids) for key, row in ours.items()} == {
        key: list(row.token_ids) for key, row in theirs.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_answers_depend_on_neither_company_nor_threads(folder, model, dtype):
    if dtype is not torch.float32:
        model = load(folder, dtype, operators=NumbaOperators(dtype))
    rows = prompts(16, 512, seed=2, longest=60, **SAMPLED)
    expected = answers(run(make_engine(model, prefill_chunk=64), rows))
    assert len({str(answer) for answer in expected.values()}) > 13, "the answers must differ for this to say anything"
    shuffled = random.Random(5).sample(rows, len(rows))
    for seqs, batched, blocks, order, count in [
        (1, 512, 2000, rows[::6], 1), (7, 512, 2000, rows, 2), (16, 64, 2000, shuffled, 3), (24, 512, 34, shuffled, 1),
    ]:  # fmt: skip
        engine = make_engine(
            model, max_num_seqs=seqs, max_num_batched_tokens=batched, kv_blocks=blocks, prefill_chunk=64
        )
        with threads(count):
            found = answers(run(engine, order))
        assert found == {key: expected[key] for key in found}
        assert len(found) == len(order)
