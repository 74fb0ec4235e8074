"""The benchmarks under benchmarks/ run: what they measure is for a quiet machine."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


def test_a_decode_step_beside_the_model_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    bench_step = importlib.import_module("bench_step")
    seconds = bench_step.step_seconds(3, 5, bench_step.SAMPLINGS["greedy"])
    assert seconds.shape == (5, 2)
    assert (seconds[:, 0] > seconds[:, 1]).all()
    assert (seconds > 0).all()
