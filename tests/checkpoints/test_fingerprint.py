"""Weights that differ in any byte are other weights, wherever and in whatever layout the byte lies."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_mixtral, save_fused, save_hub, save_mistral

from batchmix.checkpoints.checkpoint import TINY, open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.checkpoints.loading import load_weights
from batchmix.config import Config
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.models.tensor_parallel import TensorParallel
from batchmix.output.config import OutputConfig, Redo
from batchmix.output.run_info import accept_weights
from batchmix.pipeline import generate
from batchmix.sampling import SamplingConfig
from batchmix.storage import LocalFolder
from batchmix.storage.bookkeeping import WEIGHTS


def fingerprint(folder: Path, tp: TensorParallel | None = None) -> str | None:
    checkpoint = open_checkpoint(ModelConfig(path=str(folder)))
    return load_weights(checkpoint, torch.float32, torch.device("cpu"), tp or TensorParallel()).fingerprint


@pytest.mark.parametrize(
    ("save", "file"),
    [
        (save_hub, "model.safetensors"),
        (save_fused, "model.safetensors"),
        (save_mistral, "consolidated.safetensors"),
        (lambda model, folder: save_mistral(model, folder, pth=True), "consolidated.00.pth"),
    ],
    ids=["hub", "fused", "mistral", "pth"],
)
def test_one_bit_anywhere_is_noticed_and_a_copy_is_not(
    tmp_path: Path, save: Callable[[Any, Path], Path], file: str
) -> None:
    folder = save(random_mixtral(), tmp_path / "m")
    before = fingerprint(folder)
    assert before is not None
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = next(iter(copy.glob(file)), None) or next(copy.glob("consolidated*"))
    os.utime(path, (0, 0))
    assert fingerprint(copy) == before
    assert fingerprint(copy, TensorParallel(0, 2)) == before, "rank 0 hashes whole tensors"
    assert fingerprint(copy, TensorParallel(1, 2)) is None
    size = path.stat().st_size
    weight_bytes = bytearray(path.read_bytes())
    for place in (size // 3, size // 2, size * 4 // 5):  # amid tensors
        weight_bytes[place] ^= 1
        path.write_bytes(weight_bytes)
        assert fingerprint(copy) != before, place
        weight_bytes[place] ^= 1


def zero_experts(path: Path) -> None:
    """Another model of the same size, whose first and last 64 KiB are the same."""
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if ".experts." in name:
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            start, end = max(start, 70_000), min(end, len(data) - 70_000)
            if end > start:
                data[start:end] = bytes(end - start)
    path.write_bytes(data)


def job(tmp_path: Path, limit: int | None, **output: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(tmp_path / "m")),
        data=DataConfig(path=str(tmp_path / "rows.jsonl"), limit=limit),
        sampling=SamplingConfig(max_tokens=2, temperature=0.0),
        engine=EngineConfig(device="cpu"),
        output=OutputConfig(dir=str(tmp_path / "out"), **output),
    )


@pytest.mark.slow  # 5 s and more
def test_a_resume_with_other_weights_commits_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    shutil.copytree(TINY, tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(6)))
    generate(job(tmp_path, 3))
    weights = tmp_path / "m" / "model.safetensors"
    other = tmp_path / "other"
    shutil.copy(weights, other)
    zero_experts(other)
    weights, kept = weights.rename(tmp_path / "kept"), weights
    shutil.copy(other, kept)
    before = sorted((tmp_path / "out").glob("part-*"))
    for config in (job(tmp_path, 3, redo=Redo.length), job(tmp_path, 6)):
        with pytest.raises(BatchmixError, match="model is another: the values of its weights differ"):
            generate(config)
        assert sorted((tmp_path / "out").glob("part-*")) == before
        shutil.rmtree(tmp_path / "out" / ".batchmix/redo", ignore_errors=True)
    shutil.copy(weights, kept)  # the same bytes, written now
    (tmp_path / "out" / WEIGHTS).unlink()  # as an earlier release leaves it
    generate(job(tmp_path, 5))
    assert "kept no checksum of the weights" in caplog.text
    generate(job(tmp_path, 6))
    shutil.copy(other, kept)
    generate(job(tmp_path, 6, overwrite=True))
    generate(job(tmp_path, None, overwrite=True))


def test_random_weights_need_none(tmp_path: Path) -> None:
    accept_weights(LocalFolder(tmp_path), None)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_of_the_fingerprint_is_named(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).parent.mkdir()
    (tmp_path / WEIGHTS).write_text("{")
    with pytest.raises(BatchmixError, match=rf"{re.escape(WEIGHTS)}: cannot be read \(.*\)"):
        accept_weights(LocalFolder(tmp_path), "0")
