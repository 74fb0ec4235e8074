"""What is said to Slurm and what Slurm says, with stand-ins for its commands; `tests/cluster/` has the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.errors import MissingConfigException

from batchmix.config_errors import explain
from batchmix.distributed import slurm
from batchmix.install_hint import install_hint


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that has the arguments of each call of scontrol; squeue gives `state`."""
    log = tmp_path / "called"
    (tmp_path / "squeue").write_text(
        f'#!/bin/sh\ncase "$*" in *"--jobs=$(cat {tmp_path}/task) "*) cat {tmp_path}/state;; esac\n'
    )
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    for name in ("squeue", "scontrol"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    log.touch()
    return log


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize(
    ("state", "again"), [("RUNNING None", True), ("COMPLETING TimeLimit", True), ("COMPLETING None", False)]
)
def test_a_task_is_requeued_unless_it_was_cancelled(
    called: Path, monkeypatch: pytest.MonkeyPatch, state: str, again: bool, array: bool
) -> None:
    if array:  # its last task has the number of the whole array: requeued by that, all its tasks would be
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    task = "70_7" if array else "70"
    called.with_name("task").write_text(task)
    called.with_name("state").write_text(f"{state}\n")
    said = slurm.requeue()
    assert called.read_text() == (f"requeue {task}\n" if again else "")
    assert said.startswith(f"job {task} goes back" if again else f"job {task} is COMPLETING and stays out of the queue")


def test_a_refusal_of_scontrol_is_told(called: Path) -> None:
    called.with_name("task").write_text("70")
    called.with_name("state").write_text("RUNNING None\n")
    called.with_name("scontrol").write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2; exit 1\n")
    assert slurm.requeue() == (
        "job 70 could not be requeued (Requested operation is presently disabled), run the same command again for the rest"
    )


def test_nothing_is_requeued_outside_submitit(called: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBMITIT_EXECUTOR")
    assert slurm.requeue() == "run the same command again for the rest"
    assert called.read_text() == ""


def test_what_is_missing_is_named() -> None:
    missing = MissingConfigException("Could not load", missing_cfg_file="hydra/launcher/submitit_slurm")
    assert explain(missing, "generate") == f"hydra/launcher=slurm: needs submitit; {install_hint('cluster')}"
    no_srun = RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?')
    assert "no Slurm on this machine" in str(slurm.explain(no_srun))
    assert slurm.explain(ValueError("a bug")) is None
