"""`batchmix plan` of models larger than the card, and the table of cards in docs/memory.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from batchmix.checkpoints.config import ModelConfig, ModelFormat, OffloadMode
from batchmix.config import Config
from batchmix.dtypes import Quantization
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.jobs.plan import main
from batchmix.measure.workloads import save_model
from batchmix.plan import plan_report
from batchmix.planning.config import PlanConfig

DOCS = Path(__file__).parents[2] / "docs" / "memory.md"


def test_the_docs_have_the_table_that_the_command_prints(capsys):
    assert main(["table"]) == 0
    printed = capsys.readouterr().out.strip()
    assert f"\n\n{printed}\n\n" in DOCS.read_text(), "python -m batchmix plan table, and paste it into docs/memory.md"
    assert printed.count("\n") > 40


@pytest.fixture
def config(tmp_path):
    save_model(tmp_path, "8x7b", 32, "bfloat16")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt_token_ids": [7] * 500}) + "\n" for _ in range(1500)))
    return Config(
        model=ModelConfig(path=str(tmp_path), format=ModelFormat.random, max_model_len=4096),
        data=DataConfig(path=str(rows)),
        plan=PlanConfig(gpu="rtx4090", expected_tokens=250, host_memory_gb=256),
    )


def printed(config, capsys):
    config.output.dir = ""
    plan_report(config)
    return capsys.readouterr().out


def test_a_plan_of_streamed_weights(config, capsys):
    text = printed(config, capsys)
    assert re.search(r"weights 86\.99 GiB, experts of \d+ of 32 layers streamed \(\d\d\.\d\d GiB a step\);", text)
    assert re.search(r"KV cache 128\.0 KiB a token on the host, [\d,]+ tokens fit, 1,\d\d\d rows at once", text)
    assert re.search(r"a decode step [\d.]+ s, bound by link: 1\d\d tokens/s", text)
    assert "model.tensor_parallel_size=8 would hold all weights: " in text
    assert "assuming 60% of the card's data sheet and 80% of its link" in text


def test_a_plan_for_a_card_whose_kernels_were_measured(config, capsys):
    config.plan.gpu = "h200"
    assert " min in all, by the sum of kernels measured on such a card" in printed(config, capsys)


def test_a_plan_of_weights_that_are_not_to_be_streamed(config, capsys):
    config.model.offload = OffloadMode.never
    text = printed(config, capsys)
    assert "on 8 x NVIDIA GeForce RTX 4090" in text
    assert "streamed" not in text


def test_fp8_is_not_planned_for_a_card_that_has_no_products_of_it(config):
    config.model.quantization = Quantization.fp8
    config.plan.gpu = "a100-80gb"
    with pytest.raises(BatchmixError, match=r"plan\.gpu=a100-80gb does not multiply e4m3; use int8 or int4"):
        plan_report(config)
