"""Checkpoints that other libraries have quantised, against the weights as these libraries dequantise them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import load, packed_logits
from safetensors.torch import load_file, save_file

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.checkpoints.loading import load_weights
from batchmix.dtypes import Quantization
from batchmix.errors import BatchmixError
from batchmix.models.quantized import Quantized, quantize

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
FOLDERS = {
    "gptq": Quantization.int4,
    "gptq_asymmetric": None,
    "gptq_act_order": None,
    "awq": None,
    "bitsandbytes_nf4": None,
    "bitsandbytes_fp4": None,
    "bitsandbytes_int8": Quantization.int8,
}


@pytest.mark.parametrize(("name", "kept"), FOLDERS.items())
def test_logits_are_those_of_the_librarys_own_weights(name, kept):
    """tests/fixtures/quantized/make.py made the folders with the libraries themselves."""
    model = load(FIXTURES / name)
    expected = load_file(FIXTURES / name / "expected.safetensors")
    experts = model.weights.layers[0].w13
    assert (experts.format if isinstance(experts, Quantized) else None) is kept
    (found,) = packed_logits(model, [expected["tokens"].tolist()])
    assert (found - expected["logits"]).abs().max() <= 1e-4 * expected["logits"].abs().max()


def test_what_no_kernel_runs_is_widened_and_said_or_quantised_again(caplog):
    with caplog.at_level(logging.INFO):
        load(FIXTURES / "awq")
    assert "no kernel here runs AWQ int4, groups of 128, so the weights are widened to float32" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = load(FIXTURES / "awq", quantization=Quantization.int4)
    assert "widened" not in caplog.text
    wide = load(FIXTURES / "awq").weights.layers[0].w2
    expected = quantize(wide, Quantization.int4)
    assert torch.equal(again.weights.layers[0].w2.codes, expected.codes)


def refused(folder: Path, match: str) -> None:
    with pytest.raises(BatchmixError, match=match) as raised:
        load_weights(open_checkpoint(ModelConfig(path=str(folder))), torch.float32, torch.device("cpu"))
    assert "\n" not in str(raised.value)


def copied(name: str, tmp_path: Path, **changes: Any) -> Path:
    """A fixture with a changed quantization_config."""
    folder = Path(shutil.copytree(FIXTURES / name, tmp_path / "model", dirs_exist_ok=True))
    config = json.loads((FIXTURES / name / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_formats_that_cannot_be_read_are_named(tmp_path):
    for name, changes, match in (
        ("awq", {"quant_method": "quip"}, r"config\.json: quantization_config: quant_method 'quip' is not one of"),
        ("awq", {"version": "gemv"}, "AWQ version 'gemv' is not supported"),
        ("awq", {"bits": 8}, "AWQ of 8 bits"),
        ("gptq", {"bits": 3}, "GPTQ of 3 bits is not supported, only of 4 and 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"group_size": None}, "is incomplete"),
        ("bitsandbytes_nf4", {"load_in_4bit": False}, "neither load_in_4bit nor load_in_8bit"),
    ):  # fmt: skip
        refused(copied(name, tmp_path, **changes), match)


def test_parts_that_do_not_fit_are_named(tmp_path):
    folder = copied("gptq", tmp_path)
    state = load_file(folder / "model.safetensors")
    w1 = "model.layers.0.block_sparse_moe.experts.1.w1"

    def saved(**parts: torch.Tensor | None) -> Path:
        changed = {**state, **{f"{w1}.{part}": tensor for part, tensor in parts.items()}}
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    refused(saved(scales=None), r"tensor .*experts\.1\.w1\.scales is missing")
    refused(saved(qzeros=torch.zeros(1, 8, dtype=torch.int32)), r"w1\.qzeros is \[1, 8\], not \[1, 16\]")
    refused(saved(qzeros=torch.zeros(1, 16, dtype=torch.int32)), r"experts\.1\.w1: has other zeros than 8")
    refused(saved(g_idx=torch.ones(128, dtype=torch.int32)), r"experts\.1\.w1: g_idx is not in order")
    weight = {f"{w1}.weight": torch.zeros(128, 128)}
    parts = dict.fromkeys(("qweight", "qzeros", "scales", "g_idx"))
    save_file(
        {k: v for k, v in (state | weight).items() if not k.startswith(w1 + ".") or k.endswith(".weight")},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    assert parts
    refused(folder, r"experts\.1\.w1\.weight is not quantised, though config\.json")
    assert load(folder, quantization=Quantization.int8).weights.layers[0].w13.format is Quantization.int8
