"""`batchmix benchmark throughput` on the CPU, its roofline, its workloads, and the peers' side of it."""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys

import pytest
import torch

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig, ModelFormat
from batchmix.checkpoints.loading import load_weights
from batchmix.config import Config
from batchmix.dtypes import Dtype
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.measure import peers
from batchmix.measure.config import BenchmarkConfig
from batchmix.measure.peers import _static_batches, available_peers
from batchmix.measure.roofline import Device, roofline
from batchmix.measure.throughput import benchmark_throughput
from batchmix.measure.workloads import ROWS, WORKLOADS, draw_work, save_model
from batchmix.prompts.tokenizer import load_tokenizer

H200 = Device(bandwidth=4.3e12, flops=790e12, kv_tokens=10**9, most_rows=256)


def open_random(folder, shape="tiny", layers=2):
    save_model(folder, shape, layers, "float32")
    return open_checkpoint(ModelConfig(path=str(folder), format=ModelFormat.random))


@pytest.mark.slow  # 5 s and more
def test_whole_runs_beside_the_roofline(batchmix, tmp_path):
    done = batchmix("benchmark", "throughput", "benchmark.shape=tiny", "benchmark.rows=4", "benchmark.peers=[]",
                    "benchmark.only=[annotate,long]", "benchmark.dir=results", "engine.device=cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "results").glob("*-throughput-annotate-long.json")
    lines = done.stdout.splitlines()
    assert "tiny with 2 of 2 layers in float32" in lines[0]
    assert lines[1].startswith("annotate: 4 rows, ")
    assert lines[2].startswith("long: 1 rows, ")
    assert re.search(
        r"% of the serial roofline \([\d.]+ s at .*\), [\d.]+% of the overlapped one \([\d.]+ s\)", lines[1]
    )
    assert lines[-1] == f"written: results/{path.name}"
    result = json.loads(path.read_text())
    for name, found in result["workloads"].items():
        ours, work = found["batchmix"], found["work"]
        assert 0 < ours["device_busy"] <= 1
        assert ours["peak_memory_gib"] > 0
        assert ours["output_tokens_per_second"] == pytest.approx(work["output_tokens"] / ours["seconds"], rel=0.01)
        assert 0 < ours["share_of_overlapped_roofline"] <= ours["share_of_roofline"]
        assert found["roofline"]["overlapped_seconds"] > 0
        assert (work["shared_tokens"] > 80) == (name == "annotate")
    assert [entry.name for entry in tmp_path.iterdir()] == ["results"], "nothing is left elsewhere"


@pytest.mark.slow  # transformers is imported, and its continuous batching set up, in processes of their own
def test_peers_run_on_the_same_prompts(batchmix, tmp_path):
    done = batchmix("benchmark", "throughput", "benchmark.shape=tiny", "benchmark.rows=4", "benchmark.only=[annotate]",
                    "benchmark.peers=[transformers,generate_batch]", "engine.device=cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("*.json")
    found = json.loads(path.read_text())["workloads"]["annotate"]
    for peer in ("transformers", "generate_batch"):
        assert found[peer]["complete"], done.stdout
        assert found[peer]["output_tokens"] == found["work"]["output_tokens"]


SGLANG = """
import json
class Engine:
    def __init__(self, **options):
        print("OPTIONS " + json.dumps(options))
    def generate(self, *, input_ids, sampling_params):
        assert all(one["ignore_eos"] and one["temperature"] == 0 for one in sampling_params)
        return [{"output_ids": [7] * one["max_new_tokens"], "meta_info": {"completion_tokens": one["max_new_tokens"]}}
                for one in sampling_params]
    def shutdown(self):
        print("SHUTDOWN")
"""


def test_sglang_is_asked_for_the_same_work(tmp_path, monkeypatch):
    """A stand-in for a package that is not at hand: what it is given, and what is made of its answers."""
    (tmp_path / "sglang.py").write_text(SGLANG)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    work = {"model": "folder", "device": "cuda", "dtype": "bfloat16", "seconds": 5,
            "workloads": {"annotate": {"prompts": [[5, 6, 7], [5]], "answers": [4, 9]}}}  # fmt: skip
    (tmp_path / "work.json").write_text(json.dumps(work))
    command = [sys.executable, "-m", "batchmix.measure.peers", "sglang", str(tmp_path / "work.json")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    options = json.loads(lines[0].removeprefix("OPTIONS "))
    assert options == {"model_path": "folder", "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16",
                       "context_length": 18, "max_running_requests": 1024, "log_level": "error"}  # fmt: skip
    result = json.loads(lines[1].removeprefix("RESULT "))
    assert (result["peer"], result["rows"], result["complete"], result["output_tokens"]) == ("sglang", 2, True, 13)
    assert lines[2] == "SHUTDOWN"


VLLM = """
import json, pathlib
class SamplingParams:
    def __init__(self, **options):
        assert options["ignore_eos"] and options["temperature"] == 0
class LLM:
    def __init__(self, **options):
        pathlib.Path(__file__).with_name("options.json").write_text(json.dumps(options))
    def generate(self, prompts, sampling, use_tqdm):
        assert len(prompts) == len(sampling) and all(prompt["prompt_token_ids"] for prompt in prompts)
"""


@pytest.mark.slow  # 5 s and more
def test_a_peer_that_lies_unpacked_in_a_folder(batchmix, tmp_path):
    """Only peers run, and one that can quantise as it loads has the weights and the cache that ours have."""
    (tmp_path / "unpacked" / "vllm").mkdir(parents=True)
    assert "vllm" not in available_peers(str(tmp_path / "unpacked")), "a folder without a module is no package"
    (tmp_path / "unpacked" / "vllm" / "__init__.py").write_text(VLLM)
    assert "vllm" in available_peers(str(tmp_path / "unpacked"))
    done = batchmix("benchmark", "peers", "benchmark.shape=tiny", "benchmark.rows=3", "benchmark.only=[synthesise,annotate]",
                    "benchmark.peers=[vllm]", "benchmark.peers_path=unpacked", "benchmark.dir=results", "engine.device=cpu",
                    "model.quantization=fp8", "model.kv_cache_dtype=fp8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "results").iterdir()
    assert path.name.endswith("-peers-synthesise-annotate-fp8.json")
    for found in json.loads(path.read_text())["workloads"].values():
        assert found.keys() == {"work", "vllm"}
        assert found["vllm"]["complete"]
        assert found["vllm"]["weights"] == "fp8"
        assert found["vllm"]["output_tokens"] == found["work"]["output_tokens"]
    options = json.loads((tmp_path / "unpacked" / "vllm" / "options.json").read_text())
    assert (options["quantization"], options["kv_cache_dtype"], options["dtype"]) == ("fp8", "fp8", "float32")
    assert done.stdout.splitlines()[0].startswith("synthesise: vllm ")


HANGING = """
import time
class SamplingParams:
    def __init__(self, **options): pass
class LLM:
    def __init__(self, **options): self.calls = 0
    def generate(self, prompts, sampling, use_tqdm):
        self.calls += 1
        time.sleep(0.01 if self.calls < 3 else 3600)
"""


def test_what_a_peer_measured_before_it_was_ended_is_kept(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(HANGING)
    ends = []  # instead of by the clock, time is up once the first result is there

    class Timer:
        def __init__(self, seconds, end):
            ends.append(end)

        def start(self):
            pass

        def cancel(self):
            ends.clear()

    monkeypatch.setattr(peers.threading, "Timer", Timer)
    rows = {"prompts": [[5, 6, 7]], "answers": [4]}
    work = {"model": "folder", "device": "cpu", "dtype": "float32", "seconds": 7,
            "workloads": {"annotate": rows, "long": rows}}  # fmt: skip
    (tmp_path / "work.json").write_text(json.dumps(work))
    results = peers.run_peer("vllm", tmp_path / "work.json", str(tmp_path))
    first = next(results)
    assert (first["workload"], first["output_tokens"]) == ("annotate", 4)
    ends[0]()
    [last] = results
    assert last["error"].startswith("ended after 268 s")
    assert not ends


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"name": "peers", "peers": []}, "benchmark peers: none of transformers, generate_batch, vllm, sglang can be"),
        ({"peers_path": "/nowhere"}, "benchmark.peers_path has '/nowhere', which is no folder"),
        ({"shape": "7b"}, "benchmark.shape=7b: the shapes are 8x7b, 8x22b, tiny"),
        ({"only": ["anotate"]}, "benchmark.only has 'anotate'; the workloads are annotate, synthesise, long"),
        ({"peers": ["tgi"]}, "benchmark.peers has 'tgi'; the peers are transformers, generate_batch, vllm, sglang"),
        ({"peers": ["sglang"]}, "benchmark.peers has 'sglang', which cannot be imported here"),
        ({"rows": 0}, "benchmark.rows=0: must be at least 1"),
        ({}, "there is no GPU, and benchmark.shape=8x7b would take days on a CPU"),
    ],
)
def test_wrong_input_is_one_line(keys, line):
    config = Config(benchmark=BenchmarkConfig(**{"name": "throughput"} | keys), engine=EngineConfig(device="cpu"))
    with pytest.raises(BatchmixError, match=re.escape(line)):
        benchmark_throughput(config)


@pytest.mark.parametrize(("rows", "expected"), [(64, 2.7e3), (256, 8.6e3), (512, 13.2e3), (1024, 15.8e3)])
def test_the_roofline_of_decode_is_the_published_tables(tmp_path, rows, expected):
    """Output tokens/s of Mixtral-8x7B in bf16 on an H200 at an average context of 1,024 (docs/performance.md)."""
    model = open_random(tmp_path, "8x7b", 32).config
    device = Device(H200.bandwidth, H200.flops, H200.kv_tokens, most_rows=rows)
    found = roofline(model, 2, [1000] * rows, [49] * rows, 0, device)
    assert found.rows_at_once == rows
    assert rows * 48 / found.decode_seconds == pytest.approx(expected, rel=0.04)


def test_the_roofline_of_prefill_and_what_sharing_and_memory_change(tmp_path):
    model = open_random(tmp_path, "8x7b", 32).config
    prefill = roofline(model, 2, [1024] * 512, [1] * 512, 0, H200)
    assert prefill.decode_seconds == 0
    assert 512 * 1024 / prefill.prefill_seconds == pytest.approx(30.9e3, rel=0.03)
    shared = roofline(model, 2, [1024] * 512, [1] * 512, 512, H200)
    assert shared.prefill_seconds == pytest.approx(prefill.prefill_seconds / 2, rel=0.05)
    alone, together = (roofline(model, 2, [1000] * 600, [49] * 600, shared, H200) for shared in (0, 700))
    assert together.decode_seconds < alone.decode_seconds
    tight = Device(H200.bandwidth, H200.flops, kv_tokens=1024 * 100, most_rows=256)
    assert roofline(model, 2, [1000] * 600, [49] * 600, 0, tight).rows_at_once == pytest.approx(100, rel=0.01)
    # Few rows wait for weights, and 97 % of those are experts': a quarter of the bytes is nearly a quarter of the time.
    few = Device(H200.bandwidth, H200.flops, H200.kv_tokens, most_rows=4)
    wide = roofline(model, 2, [10] * 4, [9] * 4, 0, few)
    narrow = roofline(model, 2, [10] * 4, [9] * 4, 0, few, expert_itemsize=0.5)
    assert narrow.decode_seconds == pytest.approx((0.97 / 4 + 0.03) * wide.decode_seconds, rel=0.03)
    faster = Device(H200.bandwidth, H200.flops, H200.kv_tokens, most_rows=256, expert_flops=2 * H200.flops)
    assert roofline(model, 2, [1024] * 512, [1] * 512, 0, faster).prefill_seconds < 0.65 * prefill.prefill_seconds
    # One long answer among short ones: no fewer steps than it has tokens.
    assert roofline(model, 2, [10] * 100, [2] * 99 + [1001], 0, H200).rows_at_once == pytest.approx(1.1, rel=0.01)


def test_the_overlapped_roofline_is_all_operations_or_all_bytes(tmp_path):
    """By hand: 512 rows of 1,000 and 100 tokens, of which the cache holds 256, in 512 * 99 / 256 steps."""
    model = open_random(tmp_path, "8x7b", 32).config
    work = [1000] * 512, [100] * 512
    found = roofline(model, 2, *work, 0, H200)
    token = 2 * 32 * (4096 * 128 * 80 + 4096 * 8 + 2 * 3 * 4096 * 14336)
    pairs = 512 * (1000**2 / 2 + 99 * 1000 + 99 * 100 / 2)
    operations = 512 * (1099 * token + 100 * 2 * 32000 * 4096) + pairs * 4 * 32 * 32 * 128
    assert found.overlapped_seconds == pytest.approx(operations / 790e12)
    assert found.overlapped_seconds < found.seconds
    slow = Device(bandwidth=1e12, flops=790e12, kv_tokens=10**9, most_rows=256)
    weights = 2 * (32 * (4096 * 128 * 80 + 4096 * 8 + 8 * 3 * 4096 * 14336) + 32000 * 4096)
    moved = 99 * 2 * weights + 512 * (99 * 1000 + 99 * 100 / 2) * 2 * 32 * 8 * 128 * 2
    assert roofline(model, 2, *work, 0, slow).overlapped_seconds == pytest.approx(moved / 1e12)
    prefill_alone = roofline(model, 2, [1000] * 512, [1] * 512, 0, H200)
    assert prefill_alone.overlapped_seconds == prefill_alone.seconds


@pytest.mark.slow  # seconds under the interpreter, or of processes
@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_seeded_and_as_long_as_they_should_be(tmp_path, name):
    model = open_random(tmp_path).config
    work = draw_work(name, None, "8x7b", model, None, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert len(work.prompts) == len(rows) == ROWS[name]
    assert [row["prompt_token_ids"] for row in rows] == work.prompts
    assert [row["sampling"]["max_tokens"] for row in rows] == work.answers
    prompts, answers = [len(prompt) for prompt in work.prompts], work.answers
    if name == "annotate":
        assert work.shared == 700
        assert statistics.mean(prompts) == pytest.approx(1100, rel=0.03)
        assert set(answers) == {48}
    elif name == "synthesise":
        assert statistics.mean(prompts) == pytest.approx(200, rel=0.05)
        assert statistics.mean(answers) == pytest.approx(350, rel=0.06)
        assert max(answers) == 1024
    else:
        assert (min(prompts) >= 4096, max(prompts) <= 16384, set(answers)) == (True, True, {256})
    some = [draw_work(name, 8, "8x7b", model, None, tmp_path) for _ in range(2)]
    assert some[0] == some[1]


def test_words_are_a_token_each(tmp_path):
    checkpoint = open_random(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    text = draw_work("annotate", 20, "8x7b", checkpoint.config, tokenizer, tmp_path)
    ids = draw_work("annotate", 20, "8x7b", checkpoint.config, None, tmp_path)
    assert [len(prompt) for prompt in text.prompts] == [len(prompt) + 8 for prompt in ids.prompts]
    assert text.shared >= 700


def test_random_weights_are_the_same_at_every_start_and_told_from_a_checkpoint(tmp_path):
    checkpoint = open_random(tmp_path)
    one, two = (load_weights(checkpoint, torch.float32, torch.device("cpu")) for _ in range(2))
    assert torch.equal(one.layers[1].w13, two.layers[1].w13)
    assert not torch.equal(one.layers[0].w13, one.layers[1].w13)
    assert one.layers[0].w2.std() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(one.norm, torch.ones_like(one.norm))
    assert checkpoint.files == ()
    other = open_checkpoint(ModelConfig(path="tiny", format=ModelFormat.random, dtype=Dtype.float32))
    assert other.fingerprint() != open_checkpoint(ModelConfig(path="tiny", dtype=Dtype.float32)).fingerprint()


def test_static_batches_hold_each_prompt_once_and_keep_their_limits():
    source = random.Random(0)
    prompts = [[5] * source.randint(1, 5000) for _ in range(300)]
    batches = _static_batches(prompts)
    assert sorted(row for batch in batches for row in batch) == list(range(300))
    for batch in batches:
        assert len(batch) <= 64
        assert len(batch) * max(len(prompts[row]) for row in batch) <= 65536
