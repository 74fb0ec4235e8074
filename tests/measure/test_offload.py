"""`batchmix benchmark offload` on the CPU: its code path, with a fake link, and its peer's."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from links import FakeLink

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig, ModelFormat
from batchmix.config import Config
from batchmix.engine import build
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.measure.config import BenchmarkConfig
from batchmix.measure.offload import benchmark_offload
from batchmix.measure.workloads import save_model
from batchmix.offload import setup as offloading
from batchmix.planning.cost import footprint
from batchmix.planning.memory import gpu_workspace_bytes

TINY = Config(benchmark=BenchmarkConfig(name="offload", shape="tiny", rows=3, layers=5, peers=[]),
              engine=EngineConfig(device="cpu", max_num_seqs=3))  # fmt: skip


def test_what_was_streamed_beside_the_link(tmp_path, monkeypatch, capsys):
    save_model(tmp_path, "tiny", 5, "float32")
    checkpoint = open_checkpoint(ModelConfig(path=str(tmp_path), format=ModelFormat.random))
    model = footprint(checkpoint.config, 4)
    workspace = gpu_workspace_bytes(checkpoint.config, 3, TINY.engine.max_num_batched_tokens, 4)
    capacity = int((workspace + model.fixed_bytes + 4 * model.layer_bytes) / TINY.engine.gpu_memory_utilization)
    links = []

    def small_card(*_):
        links.append(FakeLink(capacity))
        return links[-1]

    for module in (build, offloading):
        monkeypatch.setattr(module, "open_transfer_stream", small_card)
    monkeypatch.setattr(offloading, "_MEASURED_BYTES", 1 << 20)
    monkeypatch.setattr(
        build, "measure_workspace", lambda model, rows, tokens, *_: gpu_workspace_bytes(model.config, rows, tokens, 4)
    )
    config = replace(TINY, benchmark=replace(TINY.benchmark, dir=str(tmp_path)))
    path = benchmark_offload(config)
    result = json.loads(path.read_text())
    ours = result["batchmix"]
    assert 0 < ours["decode_streamed_bytes"] < ours["streamed_bytes"] == links[0].copied - 2 * (1 << 20)
    assert ours["share_of_link"] > 0
    assert result["peers"] == []
    assert re.search(r"GB/s streamed in decode, [\d.]+% of the link's [\d.]+ GB/s$", capsys.readouterr().out.strip())


def test_without_a_link_nothing_is_streamed(tmp_path, capsys):
    path = benchmark_offload(replace(TINY, benchmark=replace(TINY.benchmark, dir=str(tmp_path))))
    result = json.loads(path.read_text())
    assert (result["batchmix"]["streamed_bytes"], result["link_bytes_per_second"]) == (0, None)
    assert capsys.readouterr().out.strip().endswith("there is no link")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"shape": "7b"}, "benchmark.shape=7b: the shapes are 8x7b, 8x22b, tiny"),
        ({"peers": ["vllm"]}, "benchmark.peers=['vllm']: the one peer is accelerate"),
        ({"shape": "8x7b"}, "there is no GPU to stream benchmark.shape=8x7b to"),
    ],
)
def test_wrong_input_is_one_line(keys, line):
    with pytest.raises(BatchmixError, match=re.escape(line)):
        benchmark_offload(replace(TINY, benchmark=replace(TINY.benchmark, **keys)))
