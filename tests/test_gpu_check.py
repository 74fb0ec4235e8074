"""jobs/gpu_check.sh, as far as it goes in no time; run without a GPU it tries all of its own code path."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "jobs" / "gpu_check.sh"
VLLM = """
from vllm_extra import VERSION
class SamplingParams:
    def __init__(self, **options): pass
class LLM:
    def __init__(self, **options): assert options["load_format"] == "dummy"
    def generate(self, prompts, sampling, use_tqdm): assert len(prompts) == len(sampling)
"""


def check(out: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out), "PEERS_PACKED": str(out / "none")} | settings
    return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=1200)


def summary(out: Path) -> dict[str, dict[str, object]]:
    [path] = out.glob("*-gpu-check-*.json")
    steps: dict[str, dict[str, object]] = json.loads(path.read_text())["steps"]
    return steps


def test_it_is_a_script_that_bash_can_read():
    assert os.access(SCRIPT, os.X_OK)
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def test_what_is_missing_is_named(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # one without site-packages
    python.chmod(0o755)
    done = check(tmp_path / "out", PYTHON=str(python))
    assert done.returncode == 1
    assert "not installed, and no wheels of them in wheels/: numpy pyarrow hydra-core" in done.stderr


def test_an_unknown_step_is_named_before_anything_runs(tmp_path):
    done = check(tmp_path / "out", "tests", "speed")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check: speed: no such step; the steps are unpack smoke synthesise annotate")
    assert not (tmp_path / "out").exists()


def test_the_parts_fit_a_gpu_that_is_there_for_15_minutes():
    allowed = [
        int(line.split("ALLOWED=")[1].split()[0]) for line in SCRIPT.read_text().splitlines() if "ALLOWED=" in line
    ]
    whole, first, second, some = allowed
    assert max(first, second) <= 600
    assert first + second == whole == some <= 840


def test_a_step_for_which_too_little_is_left_is_not_started(tmp_path):
    done = check(tmp_path, "first", TOTAL="12")
    assert done.returncode == 0, done.stdout
    steps = summary(tmp_path)
    assert list(steps) == "smoke synthesise annotate tests tune".split()
    assert all(step["needs"] > step["left"] for step in steps.values())  # type: ignore[operator]
    assert "== tests: not started: it takes 60 s at least, " in (tmp_path / "gpu-check-first.log").read_text()


def pack_stand_in(folder: Path) -> None:
    """Two folders, as vLLM comes in: a tar of a part, and a wheel of what it needs."""
    for name in ("call1", "call2"):
        (folder / name).mkdir(parents=True)
    with tarfile.open(folder / "call1" / "py.tar.xz", "w:xz") as archive:
        entry = tarfile.TarInfo("vllm/__init__.py")
        entry.size = len(VLLM)
        archive.addfile(entry, io.BytesIO(VLLM.encode()))
    with zipfile.ZipFile(folder / "call2" / "vllm_extra-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("vllm_extra-1.data/purelib/vllm_extra.py", "VERSION = 1\n")


@pytest.mark.slow  # 5 s and more
def test_packages_come_in_parts_and_are_unpacked_once(tmp_path):
    pack_stand_in(tmp_path / "packed")
    settings = {"PEERS_PATH": str(tmp_path / "unpacked"), "PACK": str(tmp_path / "all.tgz")}
    done = check(tmp_path / "out", "unpack", PEERS_PACKED=str(tmp_path / "packed" / "call1"), **settings)
    assert done.returncode == 0, done.stderr
    done = check(tmp_path / "out", "unpack", PEERS_PACKED=str(tmp_path / "packed"), **settings)
    assert "unpacked: " in done.stdout
    assert "py.tar.xz" not in done.stdout, "what is there already is not unpacked again"
    assert {path.name for path in (tmp_path / "unpacked").iterdir()} == {".unpacked", "vllm", "vllm_extra.py"}
    with tarfile.open(tmp_path / "all.tgz") as archive:
        assert "./gpu-check-some.log" in archive.getnames()


@pytest.mark.slow  # all steps at tiny shapes, each in processes of its own: two minutes
def test_a_rehearsal_without_a_gpu(tmp_path):
    pack_stand_in(tmp_path / "packed")
    settings = {"PEERS_PACKED": str(tmp_path / "packed"), "PEERS_PATH": str(tmp_path / "unpacked"), "TOTAL": "1000"}
    done = check(tmp_path / "out", **settings)
    assert done.returncode == 0, done.stdout[-3000:]
    steps = summary(tmp_path / "out")
    names = "unpack smoke synthesise annotate tests tune peers long offload guided fp8 steady kernels load"
    assert list(steps) == names.split()
    assert {step["exit_code"] for step in steps.values()} == {0}
    whats = (
        "throughput-synthesise throughput-annotate throughput-long throughput-synthesise-annotate-fp8 offload kernels"
    )
    for what in (whats + " peers-synthesise-annotate").split():
        assert list((tmp_path / "out").glob(f"*-{what}.json")), what
    assert list((tmp_path / "out" / "steady").glob("*-throughput-synthesise.json"))
