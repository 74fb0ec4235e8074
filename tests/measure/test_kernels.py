"""`batchmix benchmark kernels` and `batchmix tune` as commands, under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from batchmix.errors import BatchmixError
from batchmix.kernels import tiles
from batchmix.kernels.gpu import A100, B200, H200, MI300X, RTX4090, current_gpu
from batchmix.measure import kernels
from batchmix.measure.candidates import candidates, suits
from batchmix.measure.case import SHAPES, Case
from batchmix.measure.config import BenchmarkConfig, TuneConfig
from batchmix.measure.kernels import benchmark_kernels
from batchmix.measure.moe import FORMATS
from batchmix.measure.rest import elementwise_cases, launch_cases
from batchmix.measure.timing import Timing, seconds, time_call, time_launch
from batchmix.measure.tune import ROWS, _Product, _search, select_clearly_faster, tune

INTERPRETED = os.environ | {"TRITON_INTERPRET": "1"}


@pytest.mark.slow  # every kernel under the interpreter
def test_kernels_are_measured_and_checked(batchmix, tmp_path):
    only = "benchmark.only=[moe,decode,sampling]"
    done = batchmix("benchmark", "kernels", "benchmark.shape=tiny", only, "benchmark.tokens=[3]",
                    "benchmark.formats=[float32,int4]", "benchmark.dir=results", env=INTERPRETED)  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "results").glob("*-kernels.json")
    result = json.loads(path.read_text())
    assert done.stdout.splitlines()[-1] == f"written: results/{path.name}"
    assert result["ceilings"]["copy"] > 0
    assert [(case["kernel"], case["dtype"]) for case in result["cases"]] == [
        ("moe", "float32"), ("moe", "int4"), ("decode attention", "float32"),
        ("shared-prefix decode attention", "float32"), ("sampling", "float32"),
    ]  # fmt: skip
    for case in result["cases"]:
        assert case["right"], case
        assert case["seconds"] > 0
        assert case["share_of_ceiling"] > 0
    assert {"batch_invariant", "transformers eager", "transformers grouped_mm"} <= result["cases"][0]["peers"].keys()
    assert all("ratio" in peer for peer in result["cases"][0]["peers"].values()), result["cases"][0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_elementwise_cases_are_right(device):
    cases = list(elementwise_cases(SHAPES["tiny"], 16, torch.device(device), torch.float16))
    assert cases
    assert [case.kernel for case in cases if not case.check() <= case.tolerance] == []


@pytest.mark.slow  # two commands that search under the interpreter
def test_a_search_writes_tables_that_launchers_read(batchmix, tmp_path):
    done = batchmix("tune", "tune.shape=tiny", "tune.formats=[int4]", "tune.rows=[4]", "tune.seconds=60",
                    "tune.dir=tables", env=INTERPRETED)  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "tables").glob("cpu-*-int4.json")
    table = tiles.read_table(path)
    assert set(table) == {"up N=128 K=128", "down N=128 K=128"}
    for by_rows in table.values():
        tile = by_rows[4]
        step = tiles.block_k("int4", "cpu")
        assert tile is None or tile.block_k == step, "the step over K is the format's, not searched"
    again = batchmix("tune", "tune.shape=tiny", "tune.formats=[int4]", "tune.rows=[16]", "tune.seconds=60",
                     "tune.dir=tables", env=INTERPRETED)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert {rows for by_rows in tiles.read_table(path).values() for rows in by_rows} == {4, 16}, "other rows are kept"


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (BenchmarkConfig(shape="7b"), "benchmark.shape=7b: the shapes are 8x7b, 8x22b, tiny"),
        (BenchmarkConfig(shape="tiny", only=["mow"]), "benchmark.only has 'mow'"),
        (TuneConfig(shape="tiny", rows=[16, 0]), "tune.rows has 0; an expert has at least 1 row"),
        (TuneConfig(formats=["int3"]), "tune.formats has 'int3'; the formats are bfloat16, float16, float32, fp8,"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, config, line):
    job = tune if isinstance(config, TuneConfig) else benchmark_kernels
    with pytest.raises(BatchmixError, match=rf"^[^\n]*{re.escape(line)}[^\n]*$"):
        job(replace(config, dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("job", "config"), [(benchmark_kernels, BenchmarkConfig()), (tune, TuneConfig())])
def test_without_gpu_and_interpreter_one_line_says_so(monkeypatch, job, config):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BatchmixError, match=r"^[^\n]*there is no GPU[^\n]*$"):
        job(config)


def test_a_tile_with_a_wrong_answer_is_not_kept(monkeypatch):
    product = _Product("down", "float32", SHAPES["tiny"], torch.device("cpu"))
    product.take_rows(4)
    product.ask_oracle()
    tile = tiles.heuristic("down", "float32", 4, current_gpu(torch.device("cpu")))
    assert product.right(tile)
    wrong = replace(tile, swap_ab=not tile.swap_ab)
    run, times = product.run, {tile: 1.0, wrong: 0.5}
    monkeypatch.setattr(product, "time", lambda tile: times[tile])
    monkeypatch.setattr(product, "glance", lambda tile, fastest: times[tile])
    assert _search(product, tile, [wrong], float("inf"), "4 rows") == wrong
    monkeypatch.setattr(product, "run", lambda each: product.out.zero_() if each == wrong else run(each))
    assert _search(product, tile, [wrong], float("inf"), "4 rows") is None
    monkeypatch.setattr(product, "run", lambda each: None if each == wrong else run(each))
    assert _search(product, tile, [wrong], float("inf"), "4 rows") is None, "elements that were never written"


def test_only_a_tile_that_is_clearly_faster_than_the_rules_is_kept():
    rule, other = (tiles.heuristic("up", "bfloat16", rows, H200) for rows in (16, 32))
    for took, expected in ((1.1, None), (0.98, None), (0.969, other)):
        assert select_clearly_faster({rule: 1.0, other: took}, rule) == expected
    assert select_clearly_faster({other: 1.0}, rule) == other, "the rule's does not run here"
    assert select_clearly_faster({}, rule) is None


@pytest.mark.parametrize("gpu", [A100, RTX4090, H200, B200, MI300X], ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["up", "down"])
def test_candidates_fit_the_gpu_and_sum_in_the_formats_steps(kind, form, gpu):
    found = candidates(kind, form, gpu)
    assert len(set(found)) == len(found) > 1
    for tile in found:
        assert tile.block_k == tiles.block_k(form, gpu.arch)
        assert tile.num_stages <= tiles.most_stages(tile, kind, form, gpu)
    for rows in ROWS:
        some = [tile for tile in found if suits(tile, rows)]
        assert some
        assert all(tile.block_m < 2 * max(rows, 16) for tile in some)


def test_rows_are_searched_between_powers_of_two_and_for_prefill():
    assert {96, 144, 192, 1024, 2048, 4096} < set(ROWS)


def test_time_that_is_up_writes_no_table(tmp_path, capsys):
    with pytest.raises(BatchmixError, match=r"^tune.seconds=0: nothing could be searched in that time; give it more$"):
        tune(TuneConfig(shape="tiny", formats=["float32"], rows=[4], seconds=0.0, dir=str(tmp_path)))
    assert capsys.readouterr().out.splitlines() == [
        f"float32 {kind}, 4 rows an expert: not searched, the time is up" for kind in ("up", "down")
    ]
    assert not list(tmp_path.iterdir())


_COMPILE_CANDIDATES = """
from batchmix.kernels.compile import recorded
from batchmix.kernels.gpu import H200
from batchmix.measure.candidates import candidates, compiled
from batchmix.measure.case import SHAPES
from batchmix.measure.tune import shapes_alone

for form in ("bfloat16", "fp8", "fp8_block", "int8", "int4"):
    kinds = []
    for rows in (16, 4096):
        product = shapes_alone("up", form, SHAPES["8x7b"], rows, H200)
        tiles = candidates("up", form, H200)
        with recorded(H200) as jobs:
            for tile in tiles:
                product.run(tile)
        kinds.append([job.identity for job in jobs])
    assert kinds[0] == kinds[1] and len(kinds[0]) < len(tiles), form
few = [(product.run, tiles[:2])]
for _ in range(2):
    assert compiled(few, H200, 600.0) == [tiles[:2]]
print("--")
assert compiled(few, H200, 0.0) == [[]]
"""


@pytest.mark.slow  # processes that compile
def test_no_candidate_is_compiled_twice(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _COMPILE_CANDIDATES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("_experts_kernel.cubin"))) in (1, 2), "two tiles, twice"
    assert "skipped: not compiled within 0.0 s" in done.stdout.rpartition("--")[2]


def test_a_case_outside_its_tolerance_fails_the_benchmark(monkeypatch, tmp_path):
    wrong = Case("moe", "1 token", "float32", lambda: None, lambda: 0.5, 0.1)
    monkeypatch.setattr(kernels, "_cases", lambda config, device: iter([wrong]))
    with pytest.raises(BatchmixError, match="1 of 1 cases are not within tolerance"):
        benchmark_kernels(BenchmarkConfig(shape="tiny", dir=str(tmp_path)))
    assert list(tmp_path.iterdir()), "the figures are kept"


def test_how_each_call_was_timed_is_said(monkeypatch, tmp_path, capsys):
    peers = {"alike": lambda: None, "that waits": lambda: None, "that fails": lambda: None}
    work = Case("moe", "1 token", "float32", lambda: None, lambda: 0.0, 0.1, peers=peers)
    launch = Case("launch", "1 token", "float32", lambda: None, lambda: 0.0, 0.1, peers={"direct": print}, of_host=True)
    monkeypatch.setattr(kernels, "_cases", lambda config, device: iter([work, launch]))

    def time_call(run, device):
        if run is peers["that fails"]:
            raise RuntimeError("no kernel image")
        return Timing(2e-3, "eager" if run is peers["that waits"] else "captured graph")

    monkeypatch.setattr(kernels, "time_call", time_call)
    monkeypatch.setattr(kernels, "time_launch", lambda run, device: Timing(8e-5 if run is launch.run else 2e-5, "host"))
    path = benchmark_kernels(BenchmarkConfig(shape="tiny", dir=str(tmp_path)))
    moe, host = capsys.readouterr().out.splitlines()[-2:]
    assert moe.endswith("alike 1.00 x, that waits 1.00 x (eager), that fails does not run (no kernel image)")
    assert "80 us of the host" in host
    assert host.endswith("direct 0.25 x")
    cases = json.loads(path.read_text())["cases"]
    assert [case["timed"] for case in cases] == ["captured graph", "host"]
    assert cases[0]["peers"]["that waits"] == {"seconds": 2e-3, "timed": "eager", "ratio": 1.0}


def test_the_launch_case_compares_the_op_with_its_own_launcher():
    cpu = torch.device("cpu")
    found = list(launch_cases(SHAPES["tiny"], cpu, torch.float32))
    assert [case.work.partition(" of ")[0] for case in found] == ["RMSNorm", "add + RMSNorm"]
    for case in found:
        assert case.check() == 0.0
        assert [time_launch(run, cpu).how for run in (case.run, *case.peers.values())] == ["host", "host"]
    assert time_call(lambda: None, cpu).how == "eager"


@pytest.mark.gpu
def test_calls_are_timed_in_a_captured_graph_unless_they_wait():
    gpu = torch.device("cuda")
    x = torch.ones(1 << 26, device=gpu)
    assert time_call(lambda: x.nonzero(), gpu).how == "eager"
    captured = time_call(lambda: x.add_(1), gpu)
    assert captured.how == "captured graph"
    assert captured.seconds == pytest.approx(seconds(lambda: x.add_(1), gpu), rel=0.2)
    with pytest.raises(RuntimeError, match="size"):
        time_call(lambda: x + x[:3], gpu)
    assert 1e-7 < time_launch(lambda: x[:8].add_(1), gpu).seconds < 1e-3


def test_defaults_name_what_there_is():
    assert BenchmarkConfig().shape in SHAPES
    assert TuneConfig().shape in SHAPES
    assert set(TuneConfig().formats) <= set(FORMATS)
    assert Path(BenchmarkConfig().dir) == Path(".")
