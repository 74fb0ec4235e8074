"""jobs/k8s and jobs/slurm through the linters of their formats, which are too large for every developer's environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.cluster
JOBS = Path(__file__).parents[2] / "jobs"


def lint(program: str, *arguments: str) -> None:
    place = shutil.which(program, path=str(Path(sys.executable).parent))
    assert place is not None, f"make test-cluster installs {program}"
    done = subprocess.run([place, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["job.yaml", "volume.yaml"])
@pytest.mark.parametrize("version", ["1.31.0", "1.34.0", "1.37.0"])
def test_manifests_are_what_the_api_takes(name: str, version: str) -> None:
    import kubernetes_validate

    manifest = yaml.safe_load((JOBS / "k8s" / name).read_text())
    kubernetes_validate.validate(manifest, version, strict=True)
    manifest["spec"]["nonsense"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_dockerfile() -> None:
    lint("hadolint", str(JOBS / "k8s" / "Dockerfile"))


def test_shell_scripts() -> None:
    lint("shellcheck", str(JOBS / "slurm" / "array.sbatch"), str(JOBS / "slurm" / "scheduled.sh"))
