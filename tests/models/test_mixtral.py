"""The model against transformers.MixtralForCausalLM, and one checkpoint in all its layouts."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import random_mixtral, save_fused, save_hub, save_mistral
from engines import load, packed_logits, prompts
from safetensors.torch import load_file, save_file

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.checkpoints.loading import load_weights
from batchmix.errors import BatchmixError

SHAPES = [
    {},
    {"num_attention_heads": 4, "num_key_value_heads": 4},
    {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8},
    {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 96},
    {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 40},
    {"num_local_experts": 6, "num_experts_per_tok": 3, "rope_theta": 1e6, "vocab_size": 333},
    {"tie_word_embeddings": True, "num_hidden_layers": 3},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: ",".join(f"{k}={v}" for k, v in shape.items()) or "default")
def test_logits_equal_transformers(tmp_path, shape):
    reference = random_mixtral(**shape)
    model = load(save_hub(reference, tmp_path))
    rows = [list(prompt.token_ids) for prompt in prompts(9, model.config.vocab_size, longest=70)]
    with torch.inference_mode():
        for row, ours in zip(rows, packed_logits(model, rows), strict=True):
            theirs = reference(torch.tensor([row])).logits[0]
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("save", [save_hub, save_fused, save_mistral, lambda m, f: save_mistral(m, f, pth=True)])
def test_every_layout_loads_the_same_weights(tmp_path, save):
    reference = random_mixtral(seed=3)
    expected = load(save_hub(reference, tmp_path / "hub")).weights
    found = load(save(reference, tmp_path / "other")).weights
    assert torch.equal(expected.embedding, found.embedding)
    assert torch.equal(expected.lm_head, found.lm_head)
    for theirs, ours in zip(expected.layers, found.layers, strict=True):
        for name, weight in vars(theirs).items():
            assert torch.equal(weight, getattr(ours, name)), name


def damage(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_damaged_checkpoints_are_named(tmp_path):
    folder = save_hub(random_mixtral(), tmp_path / "model")

    def refused(match):
        with pytest.raises(BatchmixError, match=match):
            load_weights(open_checkpoint(ModelConfig(path=str(folder))), torch.float32, torch.device("cpu"))

    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    damage(folder, lambda state: state.update({name: torch.zeros(3, 4)}))
    refused(r"experts\.3\.w2\.weight is \[3, 4\], not \[64, 48\]")
    damage(folder, lambda state: state.pop(name))
    refused(r"experts\.3\.w2\.weight is missing")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused("damaged")
    (folder / "model.safetensors").unlink()
    refused(r"model\.safetensors is missing")
    (folder / "pytorch_model.bin").touch()
    refused(r"\.bin weights")


def test_what_is_no_mixtral_is_refused(tmp_path):
    def refused(match, **config):
        (tmp_path / "config.json").write_text(json.dumps({**random_mixtral().config.to_dict(), **config}, default=str))
        with pytest.raises(BatchmixError, match=match):
            open_checkpoint(ModelConfig(path=str(tmp_path)))

    with pytest.raises(BatchmixError, match=r"neither config\.json"):
        open_checkpoint(ModelConfig(path=str(tmp_path)))
    with pytest.raises(BatchmixError, match="no such folder"):
        open_checkpoint(ModelConfig(path=str(tmp_path / "none")))
    refused("model_type is 'llama'", model_type="llama")
    refused("sliding_window=128", sliding_window=128)
    folder = save_hub(random_mixtral(), tmp_path / "model")
    with pytest.raises(BatchmixError, match="allows at most 1024"):
        open_checkpoint(ModelConfig(path=str(folder), max_model_len=2000))
