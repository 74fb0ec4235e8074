"""What batchmix does for a run that Hydra's submitit launcher sends to Slurm.

submitit (1.5) requeues a task only from its own handler of SIGUSR2, without waiting for anything to be committed. While
`generate` runs, SIGUSR2 is therefore one of its own signals (signals.py); it commits, and the task is requeued here.
Before that submitit's handler stands, which may requeue at once: there is nothing to lose yet.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

REMEDY = "run the same command again for the rest"


def requeue() -> str:
    """In a task of submitit's on Slurm, put it back into the queue. Returns what became of it, in words.

    Not a task that scancel ends: nobody wants it back.
    """
    environment = os.environ
    if environment.get("SUBMITIT_EXECUTOR") != "slurm" or "SLURM_JOB_ID" not in environment:
        return REMEDY
    task = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:  # for its last task SLURM_JOB_ID is the number of the whole array
        task = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        state = _call("squeue", "--noheader", f"--jobs={task}", "--format=%T %r")
        if not (state.startswith("RUNNING") or state.endswith("TimeLimit")):
            return f"job {task} is {state.partition(' ')[0]} and stays out of the queue, {REMEDY}"
        _call("scontrol", "requeue", task)
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        return f"job {task} could not be requeued ({said}), {REMEDY}"
    return f"job {task} goes back into the queue for the rest"


def _call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def is_waiting() -> bool:
    """Whether this process has jobs in Slurm's queue, which go on without it."""
    return "submitit" in sys.modules


def explain(error: Exception) -> str | None:
    """What went wrong between submitit and Slurm, in one line; None where the error is another's."""
    if str(error).startswith('Could not detect "srun"'):
        return "hydra/launcher=slurm: there is no Slurm on this machine (no srun); submit from a login node"
    core = sys.modules.get("submitit.core.utils")
    if core is None:
        return None
    if isinstance(error, core.FailedJobError) and isinstance(error.__cause__, subprocess.CalledProcessError):
        return f"hydra/launcher=slurm: {' '.join(str(error).split())}"  # sbatch's own words
    lost = re.match(r"Job (\S+) .*? with path (.*)_result\.pkl\s.*?\(state: (\w+)", str(error), re.DOTALL)
    if isinstance(error, core.UncompletedJobError) and lost is not None:
        return f"job {lost[1]} ended as {lost[3]}, its log is {lost[2]}_log.err; what was committed is safe, {REMEDY}"
    return None
