"""A checkpoint in slices."""

from __future__ import annotations

import pytest
import torch
from checkpoints import random_mixtral, save_fused, save_hub, save_mistral
from engines import load

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.checkpoints.loading import load_weights
from batchmix.dtypes import Dtype
from batchmix.errors import BatchmixError
from batchmix.models.tensor_parallel import TensorParallel


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("save", [save_hub, save_fused, save_mistral])
def test_slices_of_every_layout_make_up_the_whole(tmp_path, save, size):
    folder = save(random_mixtral(seed=3, num_attention_heads=8, num_key_value_heads=4), tmp_path)
    checkpoint = open_checkpoint(ModelConfig(path=str(folder), dtype=Dtype.float32))
    whole = load(folder).weights
    slices = [
        load_weights(checkpoint, torch.float32, torch.device("cpu"), TensorParallel(rank, size)) for rank in range(size)
    ]
    heads = [8 // size * 16, 4 // size * 16, 4 // size * 16]  # rows of a slice's queries, keys, values
    for index, layer in enumerate(whole.layers):
        parts = [part.layers[index] for part in slices]
        joined = {
            "wqkv": torch.cat([torch.cat(kind) for kind in zip(*(p.wqkv.split(heads) for p in parts), strict=True)]),
            "wo": torch.cat([p.wo for p in parts], 1),
            "w13": torch.cat([torch.cat(kind, 1) for kind in zip(*(p.w13.chunk(2, 1) for p in parts), strict=True)], 1),
            "w2": torch.cat([p.w2 for p in parts], 2),
        }
        for name, weight in vars(layer).items():
            if name in joined:
                assert torch.equal(joined[name], weight), name
            else:
                assert all(torch.equal(getattr(part, name), weight) for part in parts), name
    assert all(torch.equal(part.embedding, whole.embedding) for part in slices)
    assert all(torch.equal(part.lm_head, whole.lm_head) for part in slices)


def test_what_cannot_be_cut_is_refused(tmp_path):
    config = open_checkpoint(ModelConfig(path=str(save_hub(random_mixtral(), tmp_path)))).config
    TensorParallel(size=2).check(config)
    with pytest.raises(BatchmixError, match=r"model\.tensor_parallel_size=4: must divide the model's 2 kv heads"):
        TensorParallel(size=4).check(config)
