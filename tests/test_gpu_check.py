"""jobs/gpu_check.sh, as far as it goes in no time; run without a GPU it tries all of its own code path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "jobs" / "gpu_check.sh"


def test_it_is_a_script_that_bash_can_read():
    assert os.access(SCRIPT, os.X_OK)
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def test_what_is_missing_is_named(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # one without site-packages
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    done = subprocess.run([str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "not installed, and no wheels of them in wheels/: numpy pyarrow hydra-core" in done.stderr
