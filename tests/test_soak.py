"""Promise 2, soaked: 60 kills at random moments, and one at each operation on the output folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # more than a thousand runs, nine minutes of CPU time
SCENARIOS = ["generate", "merge", "finalize", "redo", "old-redo"]
Process = subprocess.Popen[str]


def killed_runs(*which: str) -> Process:
    """The command that repeats it, begun."""
    helpers = Path(__file__).with_name("helpers")
    command = [sys.executable, str(helpers / "killed_runs.py"), *which]
    path = os.pathsep.join([str(helpers), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def kills(process: Process) -> int:
    """How many there were, and no row is another than in a run never killed."""
    output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(found)
    assert not found["wrong"], found
    count: int = found["kills"]
    return count


@pytest.mark.parametrize("seed", range(6))
def test_ten_kills_at_random_moments_change_no_row(seed: int) -> None:
    assert kills(killed_runs("random", str(seed))) == 10


@pytest.fixture(scope="module")
def scenarios() -> Iterator[dict[str, Process]]:
    """All at once: each is one process at a time."""
    processes = {name: killed_runs("operations", name) for name in SCENARIOS}
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_at_any_operation_changes_no_row(scenarios: dict[str, Process], name: str) -> None:
    assert kills(scenarios[name]) > 100
