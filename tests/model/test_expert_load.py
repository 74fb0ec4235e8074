"""Tokens of each expert, counted where they are routed: exact on both backends, whatever pads a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import random_mixtral, save_hub
from engines import load, make_engine, prompts, run

from batchmix.engine.stats import EngineStats
from batchmix.model import torch_backend
from batchmix.model.triton_ops import TritonOperators

V, TOP_K = 128, 2
SHAPE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 32, "head_dim": 32, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hub(random_mixtral(**SHAPE), tmp_path_factory.mktemp("model"))


def counts(folder: Path, triton: bool) -> tuple[torch.Tensor, int]:
    """The counts after a run, and the tokens that went through the model in it."""
    model = load(folder, operators=TritonOperators() if triton else torch_backend)
    options = {"capture": lambda step: step} if triton else {}  # captured steps run over free slots too
    engine = make_engine(model, block_size=4, kv_blocks=100, max_model_len=32, max_num_seqs=5, **options)
    rows = prompts(3, V, seed=2, longest=9, max_tokens=5) + prompts(1, V, seed=3, longest=9, max_tokens=2)
    for number, row in enumerate(rows):
        row.row, row.id = number, str(number)
    found = run(engine, rows)
    # A row's first token comes from its prefill, and its last does not go through the model.
    forwarded = engine.stats.prompt_tokens + sum(completion.num_tokens - 1 for completion in found.values())
    return model.expert_load.counts.cpu(), forwarded


def test_every_token_is_counted_once_in_each_layer(folder: Path) -> None:
    found, forwarded = counts(folder, triton=False)
    assert found.sum(1).tolist() == [TOP_K * forwarded] * len(found)
    assert found.max() <= forwarded


def test_the_backends_count_alike(folder: Path) -> None:
    assert torch.equal(counts(folder, triton=True)[0], counts(folder, triton=False)[0])


def test_a_step_outside_of_a_run_counts_nothing(folder: Path) -> None:
    from engines import packed_logits

    model = load(folder)
    packed_logits(model, [[5, 6, 7]])
    assert model.expert_load.counts.sum() == 0


def test_several_engines_add_up() -> None:
    total = EngineStats()
    total.sum_up(
        [EngineStats(expert_tokens=[[1, 2], [3, 4]]), EngineStats(), EngineStats(expert_tokens=[[10, 20], [30, 40]])]
    )
    assert total.expert_tokens == [[11, 22], [33, 44]]
