"""The benchmarks under benchmarks/ run: what they measure is for a quiet machine."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_decode_step_beside_the_model_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    bench_step = importlib.import_module("bench_step")
    seconds = bench_step.step_seconds(3, 5, bench_step.SAMPLINGS["greedy"])
    assert seconds.shape == (5, 5)
    assert (seconds[:, 0] > seconds[:, 1]).all()
    assert (seconds > 0).all()


def test_schedules_are_simulated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both schedules give every row its answer, and a workload below its bar is an exit code."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    bench = importlib.import_module("bench_schedule")
    cost = bench.h200_cost()
    for name in ("synthesise", "extraction", "long", "annotate"):
        work = bench.draw(name, 30)
        old, new = (bench.simulate(schedule, work, cost) for schedule in (bench.old_schedule, bench.new_schedule))
        assert old.output_tokens == new.output_tokens == work.output_tokens
        assert old.mixed_steps == 0
        assert new.seconds == pytest.approx(old.seconds, rel=0.2)
        slow = bench.simulate(bench.new_schedule, work, cost, floor=10.0)
        assert slow.seconds > new.seconds + 9
    monkeypatch.setattr(bench, "BARS", {("synthesise", 30): 0.5, ("long", 30): 9.0})
    monkeypatch.setattr("sys.argv", ["bench_schedule.py"])
    with pytest.raises(SystemExit, match=r"below the bar: long 30: [\d.]+, not 9\.0"):
        bench.main()
    assert "| synthesise | 30 | " in capsys.readouterr().out


def test_sequences_are_preempted_when_blocks_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    bench = importlib.import_module("bench_schedule")
    monkeypatch.setattr(bench, "KV_TOKENS", 64 * 40)
    cost = bench.h200_cost()
    work = bench.Workload("growing", [bench.Request(60, 400)] * 30)
    for schedule in (bench.old_schedule, bench.new_schedule):
        run = bench.simulate(schedule, work, cost)
        assert run.preempted > 0
        assert run.output_tokens > work.output_tokens, "a preempted sequence starts again"


def test_the_simulated_schedule_takes_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill of whole runs on an H200; decode there was also captured and padded, which is no part of the simulation."""
    root = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(root))
    bench = importlib.import_module("bench_schedule")
    file = root / "results" / "2026-11-28-nvidia-h200-throughput-synthesise-annotate.json"
    for name, found in json.loads(file.read_text())["workloads"].items():
        work = bench.draw(name, 800)
        assert sum(request.prompt for request in work.requests) == found["work"]["prompt_tokens"]
        assert work.output_tokens == found["work"]["output_tokens"]
        assert work.shared == found["work"]["shared_tokens"]
        run = bench.simulate(bench.old_schedule, work, bench.h200_cost())
        measured = found["batchmix"]["stage_seconds"]
        assert run.prefill_seconds == pytest.approx(measured["prefill"], rel=0.07)
        assert 0.83 < (run.seconds - run.prefill_seconds) / measured["decode"] < 1


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


def test_schemas_are_compiled_and_their_texts_are_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("py_mini_racer")  # of the `dev` extra
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    bench = importlib.import_module("bench_schemas")
    test = {"description": "a year", "data": "2024", "valid": False}
    groups = [{"description": "digits", "schema": {"type": "string", "pattern": "^\\d{3}$"}, "tests": [test]}]
    (tmp_path / "suite.json").write_text(json.dumps(groups))
    (tmp_path / "whole.json").write_text(json.dumps({"contains": {}}))
    results = bench.run("batchmix", list(bench.schemas(tmp_path)), 3)
    found = bench.summary(results)
    assert (found["schemas"], found["compiled"], found["tables"], found["texts"]) == (2, 1, 1, 3)
    assert found["schemas_with_wrong_texts"] == found["invalid_instances_accepted"] == 0
    assert "contains" in results[1]["refused"]
