"""Kernels that are compiled before they are launched, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchmix.kernels.compile import compile_in_processes, recorded, target_of
from batchmix.kernels.gpu import A100, H200, MI300X


def compile_twice(cache: Path, *arguments: str) -> dict[str, Any]:
    script = Path(__file__).parents[1] / "helpers" / "compile_twice.py"
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    experts, permute = "batchmix.kernels.moe:_experts_kernel", "batchmix.kernels.moe:_permute_kernel"
    assert found["kernels"] == [[experts, 4], [experts, 8], [permute, 4]], "once for all numbers of rows"
    assert found["launched"] == [True] * 3, "the launch has another key in the cache than the job"
    return found


@pytest.mark.slow  # 5 s and more
def test_a_launch_finds_what_was_compiled_for_it(tmp_path):
    found = compile_twice(tmp_path, "here")
    first, again = found["outcomes"]
    assert [outcome["error"] for outcome in first + again] == [None] * 6
    assert [outcome["cached"] for outcome in first + again] == [False] * 3 + [True] * 3
    assert max(outcome["shared"] for outcome in first) > 0
    assert found["again"], "a kernel that was launched before is recorded too"
    assert found["refused"] == ["a kernel is launched while another thread records what to compile"]


@pytest.mark.slow  # four processes that import torch
def test_processes_compile_each_job_once_and_survive_a_compiler_that_does_not(tmp_path):
    first, again, late = compile_twice(tmp_path)["outcomes"]
    assert [outcome["error"] for outcome in first] == [
        "the compiler ended with exit code 3",
        "AttributeError: module 'batchmix.kernels.moe' has no attribute 'gone'",
        None, None, None, None,
    ]  # fmt: skip
    assert not any(outcome["cached"] for outcome in first)
    assert [outcome["cached"] for outcome in again] == [True] * 3
    assert [outcome["error"] for outcome in late] == ["not compiled within 0.0 s"] * 3


def test_no_jobs_start_no_process():
    assert compile_in_processes([]) == []


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled")
def test_the_interpreter_records_nothing():
    with pytest.raises(RuntimeError, match="interpreter"), recorded(H200):
        pass


def test_targets_are_those_of_tritons_drivers():
    assert [(target.backend, target.arch, target.warp_size) for target in map(target_of, (A100, H200, MI300X))] == [
        ("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64),
    ]  # fmt: skip
