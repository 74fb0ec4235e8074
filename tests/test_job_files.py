"""jobs/k8s and jobs/slurm: what their files say to batchmix is what batchmix understands, and to each other the same."""

from __future__ import annotations

import re
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module

from batchmix import __version__
from batchmix.hydra_app import EXIT_ERROR, EXIT_REQUEUE, EXIT_USAGE, register, to_config

ROOT = Path(__file__).parents[1]
K8S, SLURM = ROOT / "jobs" / "k8s", ROOT / "jobs" / "slurm"


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((K8S / "job.yaml").read_text())
    return loaded


@pytest.mark.slow  # 5 s and more
def test_the_pods_of_the_job_are_its_shards(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    [container] = job["spec"]["template"]["spec"]["containers"]
    name, *overrides = container["args"]
    register(name)
    with initialize_config_module("batchmix.conf", version_base="1.3"):
        shards = []
        for index in range(job["spec"]["completions"]):
            monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))  # as Kubernetes does for Indexed Jobs
            config = to_config(compose(name, overrides=overrides), name)
            shards.append((config.shard.index, config.shard.count))
    assert shards == [(index, len(shards)) for index in range(len(shards))]
    assert config.output.dir.startswith(container["volumeMounts"][0]["mountPath"])


def test_the_job_understands_the_exit_codes(job: dict[str, Any]) -> None:
    rules = job["spec"]["podFailurePolicy"]["rules"]
    actions = {
        code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]
    }
    assert actions == {EXIT_REQUEUE: "Ignore", EXIT_ERROR: "FailIndex", EXIT_USAGE: "FailIndex"}
    assert {"type": "DisruptionTarget", "status": "True"} in [
        condition for rule in rules if rule["action"] == "Ignore" for condition in rule.get("onPodConditions", [])
    ]
    # Kubernetes takes a podFailurePolicy, and FailIndex in it, only with these.
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert job["spec"]["completionMode"] == "Indexed"
    assert "backoffLimitPerIndex" in job["spec"]


def test_the_job_finds_its_volume_and_image(job: dict[str, Any]) -> None:
    pod = job["spec"]["template"]["spec"]
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    ]
    volume = yaml.safe_load((K8S / "volume.yaml").read_text())
    assert claims == [volume["metadata"]["name"]]
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {
        item["name"] for item in pod["volumes"]
    }
    image = pod["containers"][0]["image"]
    assert image.endswith(f":{__version__}")
    assert image in (K8S / "Dockerfile").read_text()


@pytest.mark.skipif(torch.version.cuda is None, reason="torch without CUDA; `make test-lowest` has one with it")
def test_the_image_asks_for_the_cuda_of_torch() -> None:
    [found] = re.findall(r"^FROM nvidia/cuda:(\d+\.\d+)\.", (K8S / "Dockerfile").read_text(), re.MULTILINE)
    assert found == torch.version.cuda


def test_the_images_are_one(job: dict[str, Any]) -> None:
    docker = (K8S / "Dockerfile").read_text()
    sections = dict(re.findall(r"^%(\w+)\n((?:[ #].*\n|\n)*)", (SLURM / "batchmix.def").read_text(), re.MULTILINE))
    assert set(sections) == {"files", "post", "environment", "runscript", "test"}
    base = re.search(r"^FROM (nvidia/cuda:[\w.-]+)$", docker, re.MULTILINE)
    assert base is not None
    assert f"From: {base[1]}\n" in (SLURM / "batchmix.def").read_text()
    install = "pip install --no-cache-dir -c /src/constraints.txt '/src[s3]'"
    assert install in docker
    assert install in sections["post"]
    packages = re.search(r"apt-get install .*", docker)
    assert packages is not None
    assert packages[0].removesuffix(" \\") in sections["post"]
    copied = {line.split()[0] for line in sections["files"].strip().splitlines()}
    kept = {line[1:] for line in (K8S / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    # The last USER is who runs, and the pod insists on the same.
    user = re.findall(r"^USER (\d+):(\d+)$", docker, re.MULTILINE)[-1]
    context = job["spec"]["template"]["spec"]["securityContext"]
    assert user == (str(context["runAsUser"]), str(context["runAsGroup"]))
    assert int(user[0]) > 0
    assert context["runAsNonRoot"] is True


def test_every_dependency_of_the_images_is_pinned() -> None:
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {plain(line.partition("==")[0]) for line in lines if "==" in line}
    needed = {plain(re.match(r"[\w.-]+", line)[0]) for line in project["dependencies"]}  # type: ignore[index]
    assert needed <= pinned


@pytest.mark.parametrize("path", ["array.sbatch", "scheduled.sh"])
def test_scripts_can_be_started(path: str) -> None:
    assert (SLURM / path).stat().st_mode & stat.S_IXUSR
