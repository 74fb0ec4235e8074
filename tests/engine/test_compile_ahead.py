"""The kernels of a run are compiled before it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # compiles some 20 kernels for sm_90, in processes that take seconds to start
def test_steps_of_any_size_find_their_kernels_compiled(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).parents[1] / "helpers" / "run_compile_ahead.py"
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["missed"] == []
    first, second = found["said"]
    assert re.fullmatch(
        r"kernels: (1|2|3)\d compiled in \S+ s in 2 processes before the run, 0 were in Triton's cache", first
    )
    assert second == "kernels: all of this run's were compiled before"
    assert found["counted"] == 1, "one that no step launches"
    assert found["took"] > 0
