"""The wheel: what is in it, and that it works from another directory."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow  # builds a wheel and makes an environment


def test_the_wheel_runs_elsewhere(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    wheel = next(tmp_path.glob("batchmix-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("kernels/reference.py", "kernels/configs/sm_90-nvidia_h200-bfloat16.json", "planning/measured/nvidia_h200-bfloat16.json", "conf/generate.yaml", "conf/annotate/sentiment.yaml", "jobs/generate.py",
                 "models/tiny/model.safetensors", "annotate/page.html", "annotate/page.css", "annotate/page.js"):  # fmt: skip
        assert f"batchmix/{name}" in names
    assert not [name for name in names if not name.startswith("batchmix")], "nothing at the top level"
    assert not [name for name in names if name == "batchmix/kernels/__init__.py"]
    # The dependencies are those of this environment; the package itself comes from the wheel.
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    own = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(own) + "\n")
    away = tmp_path / "away"
    away.mkdir()
    (away / "rows.jsonl").write_text('{"prompt": "The parcel never came."}\n')
    command = [str(tmp_path / "env" / "bin" / "python"), "-m", "batchmix", "generate", "data.path=rows.jsonl",
               "output.dir=out", "sampling.max_tokens=8"]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=away, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (away / "out" / ".batchmix/SUCCESS").exists()
    assert sorted(path.name for path in away.iterdir()) == ["out", "rows.jsonl"]
