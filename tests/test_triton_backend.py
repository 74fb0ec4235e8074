"""`engine.backend=triton` as a user runs it, under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import torch

from batchmix.checkpoints.config import ModelConfig
from batchmix.config import Config
from batchmix.dtypes import Dtype
from batchmix.engine.config import Backend, EngineConfig
from batchmix.input.config import DataConfig
from batchmix.output.config import OutputConfig
from batchmix.pipeline import generate
from batchmix.sampling import SamplingConfig

TICKETS = Path(__file__).parent.parent / "examples" / "support_tickets.jsonl"


def answers(folder: Path) -> list[tuple[int, str, str]]:
    rows = ds.dataset(folder, format="arrow").to_table().sort_by("row").to_pylist()
    return [(row["row"], row["generated_text"], row["finish_reason"]) for row in rows]


def tickets(tmp_path: Path, count: int) -> list[dict[str, Any]]:
    lines = TICKETS.read_text().splitlines(keepends=True)[:count]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return [json.loads(line) for line in lines]


@pytest.mark.slow  # 5 s and more
def test_the_command_gives_the_torch_backends_answers(batchmix, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "My card was charged twice"}\n{"prompt": "Hello"}\n')
    for backend in ("triton", "torch"):
        done = batchmix(
            "generate", "data.path=rows.jsonl", f"output.dir={backend}", f"engine.backend={backend}",
            "model.dtype=float32", "sampling.temperature=0", "sampling.max_tokens=3", "engine.max_num_seqs=2",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert answers(tmp_path / "triton") == answers(tmp_path / "torch")


@pytest.mark.slow  # half a minute under the interpreter
def test_the_built_in_model_annotates_tickets(tmp_path):
    rows = tickets(tmp_path, 3)
    for backend in (Backend.triton, Backend.torch):
        generate(
            Config(
                model=ModelConfig(dtype=Dtype.float32),
                data=DataConfig(path=str(tmp_path / "rows.jsonl")),
                sampling=SamplingConfig(temperature=0.0, max_tokens=48),
                engine=EngineConfig(backend=backend),
                output=OutputConfig(dir=str(tmp_path / backend.name)),
            )
        )
    found = answers(tmp_path / "triton")
    assert found == answers(tmp_path / "torch")
    assert [text for _, text, _ in found] == [row["gold"] for row in rows]


@pytest.mark.slow  # 5 s and more
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies bfloat16")
def test_bfloat16_under_the_interpreter_is_refused_before_anything_is_written(batchmix, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    done = batchmix("generate", "data.path=rows.jsonl", "output.dir=out", "engine.backend=triton")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("batchmix: error: model.dtype=bfloat16: Triton's interpreter")
    assert not (tmp_path / "out").exists()
