"""From a checkpoint to an engine on a card that is too small for it, the card being a fake with a limit."""

from __future__ import annotations

import logging
import math
import re

import pytest
import torch
from checkpoints import random_mixtral, save_hub
from engines import answers, prompts, run
from hypothesis import given, settings
from hypothesis import strategies as st
from links import FakeLink

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig, OffloadMode
from batchmix.dtypes import Dtype, Quantization
from batchmix.engine import build
from batchmix.engine.build import start_engine
from batchmix.engine.config import Backend, EngineConfig
from batchmix.errors import BatchmixError
from batchmix.models.kv_cache import BLOCK_SIZE
from batchmix.offload import setup as offloading
from batchmix.offload.staged_cache import StagedKVCache
from batchmix.planning.cost import footprint
from batchmix.planning.memory import gpu_workspace_bytes

LAYERS, LONGEST, PREFILL = 6, 128, 2048
SHAPE = {"num_hidden_layers": LAYERS, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hub(random_mixtral(**SHAPE), tmp_path_factory.mktemp("model"))


def config(folder, **model):
    return ModelConfig(path=str(folder), dtype=Dtype.float32, max_model_len=LONGEST, **model)


def started(link, model, **engine):
    """As start_engine on a GPU behind `link`, the workspace being what it is estimated to be."""
    checkpoint = open_checkpoint(model)
    options = {"backend": Backend.torch, "max_num_batched_tokens": PREFILL, "gpu_memory_utilization": 1.0, **engine}

    def measured(model, rows, prefill_tokens, *_):
        return gpu_workspace_bytes(model.config, rows, prefill_tokens, 4)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, "open_transfer_stream", lambda *_: link)
        patched.setattr(build, "measure_workspace", measured)
        patched.setattr(offloading, "_MEASURED_BYTES", 1000)
        return start_engine(checkpoint, None, EngineConfig(**options), lambda: False)


ROWS = prompts(7, 128, longest=100, temperature=1.0, max_tokens=5, logprobs=1)


@pytest.fixture(scope="module")
def expected(folder):
    return {quantization: answers(run(started(None, config(folder, quantization=quantization)), ROWS))
            for quantization in (None, Quantization.int8)}  # fmt: skip


@pytest.mark.slow  # 5 s and more
@settings(max_examples=8, deadline=None)
@given(
    layers_there=st.floats(2.2, LAYERS + 1), host_tokens=st.integers(0, 2000),
    quantization=st.sampled_from([None, Quantization.int8]),
)  # fmt: skip
def test_whatever_fits_the_answers_are_the_same_and_the_cap_holds(
    folder, expected, layers_there, host_tokens, quantization
):
    """The card has room for so many layers' experts and the cache of two rows; the host for all and so many tokens."""
    checkpoint = open_checkpoint(config(folder))
    model = footprint(checkpoint.config, 4, quantization)
    workspace = gpu_workspace_bytes(checkpoint.config, 4, PREFILL, 4)
    room = model.fixed_bytes + int(layers_there * model.layer_bytes) + 2 * LONGEST * model.kv_bytes
    host_room = (
        LAYERS * model.layer_bytes + (BLOCK_SIZE + host_tokens) * model.kv_bytes + 1000
    )  # which the link is measured with
    host_room += StagedKVCache.landing_bytes(checkpoint.config, torch.float32, PREFILL + 4)
    link = FakeLink(workspace + room + 10_000, host_room=host_room)
    engine = started(link, config(folder, quantization=quantization), max_num_seqs=4)
    assert answers(run(engine, ROWS)) == expected[quantization]
    cache = engine.cache
    on_device = 0 if isinstance(cache, StagedKVCache) else cache.keys.nbytes + cache.values.nbytes
    # The block behind the cache that padding writes to is not counted on.
    assert link.peak + on_device + workspace <= link.capacity + 2 * model.kv_bytes * BLOCK_SIZE
    if engine.model.stream is None:
        assert engine.stats.streamed_bytes == link.copied == link.host_bytes == 0
    else:
        assert engine.stats.streamed_bytes > engine.stats.decode_streamed_bytes > 0
        assert engine.runner.capture is None


def test_what_is_streamed_is_said(folder, caplog):
    model = footprint(open_checkpoint(config(folder)).config, 4)
    workspace = gpu_workspace_bytes(open_checkpoint(config(folder)).config, 4, PREFILL, 4)
    capacity = workspace + model.fixed_bytes + int(4.5 * model.layer_bytes)
    with caplog.at_level(logging.INFO):
        started(FakeLink(capacity), config(folder), max_num_seqs=4)
    (record,) = caplog.records
    line = record.getMessage()
    assert re.search(
        r"GiB, experts of \d of 6 layers streamed \(0\.00 GiB a step\) at \S+ GB/s, no CUDA graphs, in ", line
    )
    assert re.search(r"KV cache \d+ tokens on the host, 4 rows at once$", line)
    with pytest.raises(
        BatchmixError, match=r"^model\.offload=never: the weights take .* GiB are free; use model\.quantization"
    ):
        started(FakeLink(model.weight_bytes), config(folder, offload=OffloadMode.never), max_num_seqs=4)
    with pytest.raises(BatchmixError, match=r"^model\.offload=auto: .* use model\.quantization, model\.offload_dir"):
        started(FakeLink(capacity, host_room=1_000_000), config(folder), max_num_seqs=4)


def test_weights_on_disk(folder, tmp_path):
    model = footprint(open_checkpoint(config(folder)).config, 4)
    workspace = gpu_workspace_bytes(open_checkpoint(config(folder)).config, 4, PREFILL, 4)
    capacity = workspace + model.fixed_bytes + int(3.5 * model.layer_bytes)
    link = FakeLink(capacity, folder=tmp_path, host_room=5 * model.layer_bytes)
    engine = started(link, config(folder, offload_dir=str(tmp_path)), max_num_seqs=4)
    assert engine.model.stream is not None
    assert answers(run(engine, ROWS)) == answers(run(started(None, config(folder)), ROWS))
    assert not list(tmp_path.iterdir())


def test_the_measured_link(monkeypatch):
    monkeypatch.setattr(offloading, "_MEASURED_BYTES", 1 << 20)
    link = FakeLink()
    rate = offloading.measure_link(link)
    assert 0 < rate < math.inf
    assert link.copied == 2 << 20
    assert link.host((4,), torch.uint8).tolist() == [0] * 4
