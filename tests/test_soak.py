"""Promise 2, soaked: 60 kills at random moments, and one at each operation on the output folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # hundreds of runs, five minutes on two quiet cores


def killed_runs(*which: str) -> dict[str, Any]:
    """What `python tests/killed_runs.py` prints: the command that repeats it."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed_runs.py"), *which],
        capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert not found["wrong"], found
    return found


@pytest.mark.parametrize("seed", range(6))
def test_ten_kills_at_random_moments_change_no_row(seed: int) -> None:
    assert killed_runs("random", str(seed))["kills"] == 10


@pytest.mark.parametrize("scenario", ["generate", "merge", "finalize", "redo"])
def test_a_kill_at_any_operation_changes_no_row(scenario: str) -> None:
    assert killed_runs("operations", scenario)["kills"] > 40
