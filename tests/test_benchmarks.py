"""The benchmarks under benchmarks/ run: what they measure is for a quiet machine."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_decode_step_beside_the_model_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    bench_step = importlib.import_module("bench_step")
    seconds = bench_step.step_seconds(3, 5, bench_step.SAMPLINGS["greedy"])
    assert seconds.shape == (5, 2)
    assert (seconds[:, 0] > seconds[:, 1]).all()
    assert (seconds > 0).all()


@pytest.mark.slow  # compiles for sm_90, which the tests' interpreter does not
def test_launches_of_a_decode_layer_are_timed() -> None:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "benchmarks"), str(root)])}
    command = [sys.executable, "benchmarks/bench_launch.py", "--rows", "30", "--turns", "2"]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("a decode layer of 30 rows: 10.1 launches, ")


@pytest.mark.slow  # starts two workers
def test_many_workers_share_one_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The stand-in engine has what the pipeline asks of an engine, and all rows come out once."""
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root / "benchmarks"), str(root)]))
    monkeypatch.setattr("sys.argv", ["bench_workers.py", "--workers", "2", "--rows", "2000", "--ideal", "1"])
    importlib.import_module("bench_workers").main()
    assert capsys.readouterr().out.startswith("2,000 rows, 2 workers of 1,000 rows/s on ")
