"""The figures of README.md and docs/ are those of the files in benchmarks/results, rounded as they are printed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from batchmix.dtypes import Quantization
from batchmix.measure.roofline import Device, roofline
from batchmix.measure.workloads import INSTRUCTION, draw_sizes
from batchmix.planning.cost import footprint
from batchmix.planning.table import MIXTRAL_8X7B

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RATE = {"synthesise": "output_tokens_per_second", "annotate": "total_tokens_per_second"}  # what a workload is judged by


def result(what: str) -> dict[str, Any]:
    """The newest result of that name, whatever its date."""
    found: dict[str, Any] = json.loads(max(RESULTS.glob(f"????-??-??-{what}.json")).read_text())
    return found


def page(name: str) -> str:
    return " ".join((ROOT / name).read_text().split())  # lines are wrapped wherever they are full


def h200(workload: str, ours: str, vllm: str | None) -> tuple[dict[str, Any], dict[str, Any], float, float]:
    """What was measured of a workload, its roofline, and the rates that are compared."""
    found = result(f"nvidia-h200-throughput-synthesise-{ours}")["workloads"][workload]
    theirs = result(f"nvidia-h200-vllm-{vllm}")["workloads"][workload]["vllm"] if vllm else {}
    return found["batchmix"], found["roofline"], found["batchmix"][RATE[workload]], theirs.get(RATE[workload], 0.0)


def overlapped_seconds(workload: str, ours: str, best: dict[str, float]) -> float:
    """By the ceilings of a result that was written before `benchmark throughput` had this roofline."""
    ceilings, fp8 = result(f"nvidia-h200-throughput-synthesise-{ours}")["ceilings"], ours.endswith("fp8")
    size = footprint(MIXTRAL_8X7B, 2, Quantization.fp8 if fp8 else None, kv_itemsize=1 if fp8 else 2)
    source = random.Random(workload)
    shared, start = (704, INSTRUCTION) if workload == "annotate" else (0, 0)
    sizes = [draw_sizes(workload, source) for _ in range(800)]
    kv_tokens = int((150e9 - 2**32 - size.weight_bytes) / size.kv_bytes)  # what an H200 reports, less than 1 % off
    found = roofline(
        MIXTRAL_8X7B, 2, [start + own + 8 for own, _ in sizes], [answer for _, answer in sizes], shared,
        Device(ceilings["copy"], ceilings["matmul"]["bfloat16"], kv_tokens, 4096, ceilings["matmul"]["fp8"] if fp8 else None),
        expert_itemsize=size.layer_bytes / (8 * 3 * 4096 * 14336), kv_itemsize=1 if fp8 else 2,
    )  # fmt: skip
    assert found.prefill_seconds == pytest.approx(best["prefill_seconds"], abs=0.001)
    assert found.decode_seconds == pytest.approx(best["decode_seconds"], abs=0.001)
    return found.overlapped_seconds


@pytest.mark.parametrize("workload", RATE)
@pytest.mark.parametrize(("weights", "suffix"), [("bf16", ""), ("fp8", "-fp8")])
def test_readme_on_a_gpu(workload, weights, suffix):
    run, _, ours, theirs = h200(workload, f"annotate{suffix}", f"0.26{suffix}")
    unit = RATE[workload].replace("_tokens_per_second", " tokens/s").replace("total tokens/s", "tokens/s in all")
    line = (
        f"| {workload}, {weights}: {unit} | {ours:,.0f} | {run['share_of_roofline']:.1%} | {theirs:,.0f} |"
        f" {ours / theirs:.2f} x |"
    )
    assert line in page("README.md")


@pytest.mark.parametrize(
    ("name", "ours", "vllm", "workloads"),
    [
        ("bf16", "annotate", "0.26", RATE),
        ("bf16, repeated beside vLLM", "run2", "0.26", ["synthesise"]),
        ("bf16, captured sizes 32 apart", "annotate-finer-sizes", "0.26", RATE),
        ("fp8 experts and cache", "annotate-fp8", "0.26-fp8", RATE),
    ],
)
def test_performance_page(name, ours, vllm, workloads):
    for workload in workloads:
        run, best, rate, theirs = h200(workload, ours, vllm)
        seconds, overlapped = run["stage_seconds"], overlapped_seconds(workload, ours, best)
        line = (
            f"| {workload} | {name} | {run['output_tokens_per_second']:,.0f} | {run['total_tokens_per_second']:,.0f} |"
            f" {run['share_of_roofline']:.1%} | {overlapped / run['seconds']:.1%} | {seconds['prefill']:.1f} of {best['prefill_seconds']:.1f} |"
            f" {seconds['decode']:.1f} of {best['decode_seconds']:.1f} | {run['device_busy']:.1%} |"
            f" {theirs:,.0f} | {rate / theirs:.2f} x |"
        )
        assert line in page("docs/performance.md")


@pytest.mark.parametrize("file", ["kernels-untuned", "kernels-moe-untuned"])
def test_kernel_page(file):
    text = page("docs/kernels.md")
    for case in result(f"nvidia-h200-{file}")["cases"]:
        if case["kernel"] in ("add + RMSNorm", "rotary + cache write", "quantise rows to fp8"):
            continue  # so short that the launch was measured, as the page says
        bound = case["bound"]
        rate = {"compute": f"{case['flops_per_second'] / 1e12:,.0f} TFLOP/s",
                "memory": f"{case['bytes_per_second'] / 1e12:.2f} TB/s"}[bound]  # fmt: skip
        peers = ", ".join(f"{name} {peer['ratio']:.2f} x" for name, peer in case["peers"].items())
        line = (
            f"| {case['kernel']} | {case['work']} | {case['dtype']} | {case['seconds'] * 1e3:.3f} | {rate} |"
            f" {case['share_of_ceiling']:.0%} | {peers} |"
        )
        assert line in text
        assert case["right"]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("cpu-engine-float32", "float32, AVX2, beside other processes"),
        ("cpu-avx512-engine-float32", "float32, AVX-512"),
        ("cpu-avx512-engine-bfloat16", "bfloat16, AVX-512"),
    ],
)
def test_performance_page_on_a_cpu(file, line):
    rates = result(file)["output_tokens_per_second"]
    ours, hf, vllm = rates["batchmix"], rates["transformers"], rates["vllm"]
    text = page("docs/performance.md")
    assert f"| {line} | {ours:,.0f} | {hf:,.0f} (" in text
    assert f"{ours / hf:.2f} x) | {vllm:,.0f} ({ours / vllm:.2f} x) |" in text


def test_performance_page_on_cpu_time():
    found = result("cpu-engine-float32")
    ours, hf, vllm = (median(found["cpu_seconds"][name]) for name in ("batchmix", "transformers", "vllm"))
    assert f"By CPU time batchmix is {vllm / ours:.2f} x vLLM and {hf / ours:.2f} x transformers" in page(
        "docs/performance.md"
    )
    same = found["prompts_with_the_same_tokens"]
    assert f"vLLM's for {same['vllm']} of 256 prompts and transformers' for {same['transformers']}" in page(
        "docs/performance.md"
    )


def test_cpu_profile():
    found = result("cpu-profile")
    parts = found["cpu_seconds"]["numba"].keys() - {"the rest"}
    for part in parts:
        torch, numba = (found["cpu_seconds"][backend][part] for backend in ("torch", "numba"))
        line = next(
            line for line in (ROOT / "docs/performance.md").read_text().splitlines() if line.startswith(f"| {part} |")
        )
        assert line.endswith(f"| {torch:.2f} | {numba:.2f} |")
    assert f"| {found['run']['torch']:.2f} | {found['run']['numba']:.2f} |" in page("docs/performance.md")


def test_performance_page_beside_the_model():
    text = page("docs/performance.md")
    found = result("cpu-pipeline")
    assert f"{found['prompt_tokens_per_second'] / 1e6:.2f} M prompt tokens/s and {found['peak_gib']:.2f} GiB" in text
    assert f"take {result('cpu-workers')['ratio']:.2f} times the ideal split" in text
    found = result("cpu-plan-large")
    assert (
        f"takes {found['seconds']:.1f} s up to the first row of one of 8 workers, and {found['peak_gib']:.2f} GiB"
        in text
    )
    greedy, sampled = result("cpu-step")["beside_the_model"].values()
    assert (
        f"{greedy['median_ms']:.2f} ms greedy; {sampled['median_ms']:.2f} ms sampled with top-p,"
        f" {sampled['sample_ms']:.2f} of them to sample the tokens. Without the operators of the backend and of torch"
        f" {greedy['host_ms']:.2f} and {sampled['host_ms']:.2f} ms" in text
    )


def test_host_time_of_a_layer():
    found = result("cpu-launch")
    assert f"{found['host_seconds_per_layer']['median'] * 1e3:.2f} ms for {found['rows']} rows, on one core" in page(
        "docs/kernels.md"
    )
