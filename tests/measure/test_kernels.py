"""`batchmix benchmark kernels` and `batchmix tune` as commands, under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from batchmix.config import BenchmarkConfig, TuneConfig
from batchmix.errors import BatchmixError
from batchmix.kernels import tiles
from batchmix.kernels.gpu import current_gpu
from batchmix.measure import kernels
from batchmix.measure.case import SHAPES, Case
from batchmix.measure.kernels import benchmark_kernels
from batchmix.measure.moe import FORMATS
from batchmix.measure.rest import elementwise_cases
from batchmix.measure.tune import _Product, tune

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
    done = batchmix("tune", "tune.shape=tiny", "tune.formats=[int4]", "tune.rows=[4]", "tune.seconds=2",
                    "tune.dir=tables", env=INTERPRETED)  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "tables").glob("*-int4.json")
    table = tiles._table(path)
    assert set(table) == {"up N=128 K=128", "down N=128 K=128"}
    for by_rows in table.values():
        assert by_rows[4].block_k == tiles.block_k("int4", "cpu"), "the step over K is the format's, not searched"
    again = batchmix("tune", "tune.shape=tiny", "tune.formats=[int4]", "tune.rows=[16]", "tune.seconds=2",
                     "tune.dir=tables", env=INTERPRETED)  # fmt: skip
    assert again.returncode == 0, again.stderr
    tiles._table.cache_clear()
    assert {rows for by_rows in tiles._table(path).values() for rows in by_rows} == {4, 16}, "other rows are kept"


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (BenchmarkConfig(shape="7b"), "benchmark.shape=7b: the shapes are 8x7b, 8x22b, tiny"),
        (BenchmarkConfig(shape="tiny", only=["mow"]), "benchmark.only has 'mow'"),
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
    product.prepare(4)
    tile = tiles.choose("down", "float32", product.columns, product.depth, 4, current_gpu(torch.device("cpu")))
    assert product.time(tile) < float("inf")
    monkeypatch.setattr(product, "run", lambda tile: product.out.zero_())
    assert product.time(tile) == float("inf")
    monkeypatch.setattr(product, "run", lambda tile: None)
    assert product.time(tile) == float("inf"), "elements that were never written"


def test_a_case_outside_its_tolerance_fails_the_benchmark(monkeypatch, tmp_path):
    wrong = Case("moe", "1 token", "float32", lambda: None, lambda: 0.5, 0.1)
    monkeypatch.setattr(kernels, "_cases", lambda config, device: iter([wrong]))
    with pytest.raises(BatchmixError, match="1 of 1 cases are not within tolerance"):
        benchmark_kernels(BenchmarkConfig(shape="tiny", dir=str(tmp_path)))
    assert list(tmp_path.iterdir()), "the figures are kept"


def test_defaults_name_what_there_is():
    assert BenchmarkConfig().shape in SHAPES
    assert TuneConfig().shape in SHAPES
    assert set(TuneConfig().formats) <= set(FORMATS)
    assert Path(BenchmarkConfig().dir) == Path(".")
