"""Tokens of each expert, counted where they are routed: exact on both backends, whatever pads a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_mixtral, save_hub
from engines import load, make_engine, prompts, run

from batchmix.models import torch_backend
from batchmix.models.mixtral import Mixtral
from batchmix.models.triton_ops import TritonOperators
from batchmix.observability.engine_stats import EngineStats

V, TOP_K = 128, 2
SHAPE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 32, "head_dim": 32, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hub(random_mixtral(**SHAPE), tmp_path_factory.mktemp("model"))


def counts(folder: Path, triton: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, int, int]:
    """The counts after a run, the tokens that went through the model for its rows, and how many of those were needed."""
    model = load(folder, operators=TritonOperators() if triton else torch_backend)
    options = {"capture": lambda step: step} if triton else {}  # captured steps run over free slots too
    engine = make_engine(model, block_size=4, kv_blocks=100, max_model_len=32, max_num_seqs=5, **options)
    real, forwarded = [0], [0]
    set_num_valid, forward = model.expert_load.set_num_valid, Mixtral.__call__

    def note(tokens: int) -> None:
        real[0] = tokens
        set_num_valid(tokens)

    def call(self: Mixtral, *arguments: Any) -> torch.Tensor:
        forwarded[0] += real[0]
        return forward(self, *arguments)

    monkeypatch.setattr(model.expert_load, "set_num_valid", note)
    monkeypatch.setattr(Mixtral, "__call__", call)
    rows = prompts(3, V, seed=2, longest=9, max_tokens=5) + prompts(1, V, seed=3, longest=9, max_tokens=2)
    for number, row in enumerate(rows):
        row.row, row.id = number, str(number)
    found = run(engine, rows)
    # A row's first token comes from its prefill, and its last need not go through the model.
    needed = engine.stats.prompt_tokens + sum(completion.num_tokens - 1 for completion in found.values())
    return model.expert_load.counts.cpu(), forwarded[0], needed


@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["torch", "triton"])
def test_every_token_of_a_row_is_counted_once_in_each_layer(
    folder: Path, triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, forwarded, needed = counts(folder, triton, monkeypatch)
    assert found.sum(1).tolist() == [TOP_K * forwarded] * len(found)
    assert found.max() <= forwarded
    assert needed <= forwarded <= needed + 2 * 4, "a row that has ended runs along for a step or two"


@pytest.mark.slow  # Triton's interpreter runs the model
def test_the_backends_count_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(counts(folder, True, monkeypatch)[0], counts(folder, False, monkeypatch)[0])


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
