"""Real processes that share one model, joined by gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import torch
from checkpoints import random_mixtral, save_hub
from engines import prompts
from processes import TICKETS, finish, listening, read, start, wait_for, workers

from batchmix.checkpoints.config import ModelConfig
from batchmix.config import Config
from batchmix.dtypes import Dtype, KVCacheDtype, Quantization
from batchmix.engine.config import Backend, EngineConfig
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.models.mixtral import Mixtral
from batchmix.output.config import OutputConfig
from batchmix.pipeline import generate
from batchmix.sampling import SamplingConfig

SAMPLED = {"temperature": 1.0, "n": 2, "max_tokens": 12, "logprobs": 0, "repetition_penalty": 1.1}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def job(model: Path, data: Path, out: Path, ranks: int, **engine: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(model), dtype=Dtype.float32, max_model_len=256, tensor_parallel_size=ranks),
        data=DataConfig(path=str(data)),
        sampling=SamplingConfig(**SAMPLED),
        engine=EngineConfig(device="cpu", **{"max_num_seqs": 24, **engine}),
        output=OutputConfig(dir=str(out)),
    )


def token_rows(path: Path, count: int, vocab_size: int) -> Path:
    rows = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts(count, vocab_size, longest=60)]
    for row in rows[::3]:
        row["sampling"] = {"temperature": 0}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(out: Path, *columns: str) -> list[tuple[Any, ...]]:
    rows = ds.dataset(out, format="arrow").to_table().to_pylist()
    rows.sort(key=lambda row: (row["row"], row["sample_index"]))
    return [
        tuple(row[name] for name in ("generated_token_ids", "finish_reason", "stop_reason", *columns)) for row in rows
    ]


def logits_of(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Run the job; the logits that rank 0 saw, step by step."""
    seen: list[torch.Tensor] = []
    original = Mixtral.logits

    def record(self: Mixtral, hidden: torch.Tensor) -> torch.Tensor:
        logits = original(self, hidden)
        seen.append(logits.clone())
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(Mixtral, "logits", record)
        generate(config)
    return seen


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], steps: int = 10) -> None:
    assert len(found) == len(expected) >= steps
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.slow  # 5 s and more
def test_two_ranks_give_the_logits_and_tokens_of_one(tmp_path, monkeypatch):
    model = save_hub(random_mixtral(), tmp_path / "model")
    data = token_rows(tmp_path / "rows.jsonl", 30, 512)
    expected = logits_of(job(model, data, tmp_path / "one", 1), monkeypatch)
    addresses: set[str] = set()
    original = Mixtral.logits

    def look(self: Mixtral, hidden: torch.Tensor) -> torch.Tensor:
        addresses.update(addresses or listening(os.getpid()))
        return original(self, hidden)

    monkeypatch.setattr(Mixtral, "logits", look)
    found = logits_of(job(model, data, tmp_path / "two", 2), monkeypatch)
    assert addresses == {"127.0.0.1"}
    assert_near(found, expected)
    assert answers(tmp_path / "two") == answers(tmp_path / "one")
    assert len(answers(tmp_path / "two")) == 60
    with pytest.raises(BatchmixError, match=r"model\.tensor_parallel_size was 2, is now 1"):
        generate(job(model, data, tmp_path / "two", 1))
    with pytest.raises(BatchmixError, match=r"must divide the model's 2 kv heads"):
        generate(job(model, data, tmp_path / "four", 4))


@pytest.mark.slow  # Triton's interpreter takes a minute
def test_two_ranks_of_the_triton_backend(tmp_path, monkeypatch):
    model = save_hub(random_mixtral(head_dim=32), tmp_path / "model")
    data = token_rows(tmp_path / "rows.jsonl", 2, 512)

    def short(out: Path, ranks: int) -> Config:
        config = job(model, data, out, ranks, backend=Backend.triton, max_num_seqs=4)
        config.sampling.max_tokens = 2
        return config

    expected = logits_of(short(tmp_path / "one", 1), monkeypatch)
    found = logits_of(short(tmp_path / "two", 2), monkeypatch)
    assert_near(found, expected, steps=2)
    assert answers(tmp_path / "two") == answers(tmp_path / "one")


@pytest.mark.slow  # starts six processes
def test_four_ranks_add_up_alike_in_any_company(tmp_path, monkeypatch):
    model = save_hub(random_mixtral(num_attention_heads=8, num_key_value_heads=4), tmp_path / "model")
    data = token_rows(tmp_path / "rows.jsonl", 20, 512)
    expected = logits_of(job(model, data, tmp_path / "one", 1), monkeypatch)
    found = logits_of(job(model, data, tmp_path / "four", 4), monkeypatch)
    assert_near(found, expected)
    assert answers(tmp_path / "four") == answers(tmp_path / "one")
    generate(job(model, data, tmp_path / "few", 4, max_num_seqs=3))
    bits = answers(tmp_path / "four", "cumulative_logprob")
    assert answers(tmp_path / "few", "cumulative_logprob") == bits


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(TICKETS.read_text(encoding="utf-8").splitlines()[:300]) + "\n", encoding="utf-8")
    return path


TWO = ["model.tensor_parallel_size=2", "model.dtype=float32"]


@pytest.mark.slow  # kills processes of runs that take ten seconds
def test_what_ends_a_run_early(tickets, tmp_path):
    code, output = finish(start(tickets, tmp_path / "undisturbed", *TWO, threads=2))
    assert code == 0, output
    expected = read(tmp_path / "undisturbed")
    out = tmp_path / "out"

    process = start(tickets, out, *TWO, threads=2)
    wait_for(lambda: list(out.glob("part-*")), process)
    (rank,) = workers(process)
    rank.kill()
    code, output = finish(process)
    assert code == 1, output
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"batchmix: error: tensor-parallel rank 1 of 2 (process {rank.pid}) was killed by SIGKILL")
    assert last.endswith("what was committed is safe, run the command again for the rest")
    assert "Traceback" not in output
    assert 0 < len(read(out)) < 300

    process = start(tickets, out, *TWO, threads=2)
    before = len(list(out.glob("part-*")))
    wait_for(lambda: len(list(out.glob("part-*"))) > before, process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    assert "Traceback" not in output

    process = start(tickets, out, *TWO, threads=2)
    wait_for(lambda: workers(process), process)
    (rank,) = workers(process)
    process.kill()
    process.communicate()
    rank.wait(timeout=20)  # raises where it outlives rank 0

    code, output = finish(start(tickets, out, *TWO, threads=2))
    assert code == 0, output
    assert read(out) == expected


# A rank that hangs, as NCCL may where another has died.
HANGS = """
import os, signal, sys, time
import batchmix.distributed.tensor_parallel as tensor
from batchmix.config import Config
if __name__ == "__main__":
    tensor._GRACE = 0.5
    config = Config()
    config.model.tensor_parallel_size = 2
    with tensor.tensor_parallel(config) as (tp, tp_workers):
        os.kill(tp_workers._workers[0].pid, signal.SIGKILL)
        time.sleep(60)
"""


@pytest.mark.slow
def test_a_rank_that_hangs_gives_up(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    started = time.monotonic()
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("batchmix: error: tensor-parallel rank 1 of 2")
    assert time.monotonic() - started < 50


@pytest.mark.slow  # starts two processes for each format
@pytest.mark.parametrize("format", [None, *Quantization])
def test_two_ranks_of_a_quantised_model(tmp_path, monkeypatch, format):
    """Codes are those of one rank. With fp8 each rank rounds its own part of silu(gate) * up, with its own scale, which
    may send a token to another expert now and then: hence the median of rows."""
    model = save_hub(random_mixtral(hidden_size=128, intermediate_size=256), tmp_path / "model")
    data = token_rows(tmp_path / "rows.jsonl", 6, 512)

    def quantised(out: Path, ranks: int) -> Config:
        config = job(model, data, out, ranks)
        config.model.quantization, config.model.kv_cache_dtype = format, KVCacheDtype.fp8
        return config

    expected = logits_of(quantised(tmp_path / "one", 1), monkeypatch)[0]
    found = logits_of(quantised(tmp_path / "two", 2), monkeypatch)[0]
    rows = expected.norm(dim=1) > 0
    error = (found - expected)[rows].norm(dim=1) / expected[rows].norm(dim=1)
    assert error.median() <= (0.1 if format is Quantization.fp8 else 1e-5), error
