"""A real one-node Slurm: an array of eight tasks, one killed, one preempted, one beyond its time limit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from one_node_slurm import missing_programs, one_node_slurm
from processes import TICKETS, finish, read, start

pytestmark = pytest.mark.cluster

SHARDS, KILLED, PREEMPTED, CANCELLED, TOO_LONG = 8, 1, 2, 3, 5
ROWS = 200
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    assert not missing_programs(), "make test-cluster installs Slurm"
    with one_node_slurm(tmp_path_factory.mktemp("slurm")) as environment:
        path = f"{Path(sys.executable).parent}:{environment['PATH']}"
        yield environment | {"PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tickets of which some have long answers, so that their shards are at work when something happens to them."""
    tokens = dict.fromkeys((KILLED, PREEMPTED, CANCELLED, TOO_LONG), 100)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, line in enumerate(TICKETS.read_text(encoding="utf-8").splitlines()[:ROWS]):
            row = json.loads(line)
            if number % SHARDS in tokens:
                row["sampling"] = {"max_tokens": tokens[number % SHARDS], "ignore_eos": True}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, ...]]:
    out = tmp_path_factory.mktemp("undisturbed")
    code, output = finish(start(data, out, "engine.max_num_seqs=256", threads=1))
    assert code == 0, output
    return read(out)


@pytest.mark.parametrize("submitit", [False, True], ids=["sbatch", "submitit"])
def test_an_array_survives(
    slurm: dict[str, str], data: Path, tmp_path: Path, expected: dict[int, tuple[Any, ...]], submitit: bool
) -> None:
    array = Array(slurm, tmp_path, data, submitit)
    try:
        array.wait(lambda: array.parts(KILLED), "rows of the task to kill")
        array.signal("KILL", KILLED)
        array.wait(lambda: array.parts(PREEMPTED), "rows of the task to preempt")
        array.signal("TERM", PREEMPTED)
        array.wait(lambda: array.parts(CANCELLED), "rows of the task to cancel")
        array.call("scancel", f"{array.number}_{CANCELLED}")
        array.wait(lambda: array.parts(TOO_LONG), "rows of the task that will be too long")
        array.freeze(TOO_LONG)  # as a file system that hangs would; Slurm wakes it with its warning
        array.call("scontrol", "update", f"JobId={array.number}_{TOO_LONG}", "TimeLimit=1")
        array.wait(lambda: array.state(CANCELLED) == "CANCELLED", "the cancelled task to end, for good")
        array.call("scontrol", "requeue", f"{array.number}_{CANCELLED}")
        if submitit:  # there is no shell that sees the process die
            array.wait(lambda: array.state(KILLED) == "FAILED", "the killed task to end")
            array.call("scontrol", "requeue", f"{array.number}_{KILLED}")
        array.wait(lambda: array.shown("Restarts", TOO_LONG) == "1", "the long task to be requeued", 200)
        array.call("scontrol", "update", f"JobId={array.number}_{TOO_LONG}", "TimeLimit=10")
        array.wait(lambda: (tmp_path / "out" / ".batchmix/SUCCESS").exists(), ".batchmix/SUCCESS", 300)
        assert read(tmp_path / "out") == expected
        logs = array.logs()
        assert "interrupted by SIGTERM" in logs[PREEMPTED]
        assert re.search("interrupted by SIGUSR[12]", logs[TOO_LONG])
        array.wait(lambda: {array.state(shard) for shard in range(SHARDS)} == {"COMPLETED"}, "all tasks to end", 30)
        restarts = {shard: int(array.shown("Restarts", shard)) for shard in range(SHARDS)}
        assert {shard for shard in restarts if restarts[shard]} == {KILLED, PREEMPTED, CANCELLED, TOO_LONG}
        assert all(restarts[shard] == 1 for shard in (KILLED, PREEMPTED, CANCELLED, TOO_LONG))
        assert array.launcher is None or array.launcher.wait(30) == 0
    finally:
        array.end()


class Array:
    """A job array that runs `batchmix generate` in the folder `out`, and Slurm's commands."""

    def __init__(self, environment: dict[str, str], folder: Path, data: Path, submitit: bool) -> None:
        self._environment, self._folder = environment, folder
        arguments = [f"data.path={data}", "output.dir=out", "sampling.max_tokens=24", "engine.max_num_seqs=1",
                     "output.rows_per_shard=10", "output.flush_seconds=0.2"]  # fmt: skip
        self.launcher: subprocess.Popen[bytes] | None = None
        if submitit:
            launcher = {
                "gpus_per_node": "null",
                "cpus_per_task": 1,
                "mem_gb": 1,
                "timeout_min": 10,
                "signal_delay_s": 55,
            }
            arguments += [f"hydra.launcher.{key}={value}" for key, value in launcher.items()]
            arguments += [
                "hydra/launcher=slurm",
                f"shard.count={SHARDS}",
                "--multirun",
                f"shard.index=range(0,{SHARDS})",
            ]
            command = [sys.executable, "-m", "batchmix", "generate", *arguments]
            with (folder / "launcher.out").open("wb") as log:
                self.launcher = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
            queue = ("squeue", "--noheader", "--name=generate", "--format=%F")  # the other array is called batchmix
            self.wait(lambda: self.call(*queue), "the array to be submitted")
            self.number = self.call(*queue).split()[0]
        else:
            options = [f"--array=0-{SHARDS - 1}", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1G", "--time=10"]
            script = str(REPOSITORY / "jobs" / "slurm" / "array.sbatch")
            # Slurm looks at time limits every 30 s, so a task of one minute is warned in its first half.
            self.number = self.call("sbatch", "--parsable", "--signal=USR1@55", *options, script, *arguments).strip()

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self._environment, cwd=self._folder, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def shown(self, field: str, shard: int) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{field}=(\S*)", self.call("scontrol", "show", "job", f"{self.number}_{shard}"))
        return found[1] if found else ""

    def state(self, shard: int) -> str:
        return self.shown("JobState", shard)

    def signal(self, name: str, shard: int) -> None:
        """To the step: for a whole job scancel may report an error that is none, and try again for minutes."""
        self.call("scancel", f"--signal={name}", f"{self.number}_{shard}.0")

    def freeze(self, shard: int) -> None:
        """Stop the processes of the step; Slurm makes something else of a SIGSTOP that scancel sends."""
        step = {
            "SLURM_ARRAY_JOB_ID": self.number,
            "SLURM_ARRAY_TASK_ID": str(shard),
            "SLURM_PROCID": "0",
            "SLURM_STEPID": "0",
        }
        frozen = 0
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if step.items() <= process.environ().items():
                    process.suspend()
                    frozen += 1
        assert frozen

    def parts(self, shard: int) -> list[Path]:
        return list((self._folder / "out").glob(f"part-{shard:05}-*"))

    def logs(self) -> dict[int, str]:
        """What each task has said."""
        paths = [*self._folder.glob("batchmix-*.log"), *self._folder.glob("out/.submitit/*/*_log.*")]
        return {
            shard: "\n".join(path.read_text() for path in paths if path.name.startswith((f"batchmix-{self.number}_{shard}.", f"{self.number}_{shard}_")))
            for shard in range(SHARDS)
        }  # fmt: skip

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                said = [f"== {shard}\n{log}" for shard, log in self.logs().items()]
                said += [path.read_text() for path in self._folder.glob("launcher.out")]
                pytest.fail(f"waited {seconds} s for {what}\n{self.call('squeue')}\n" + "\n".join(said))
            time.sleep(0.3)

    def end(self) -> None:
        if self.launcher is not None:
            self.launcher.kill()
            self.launcher.wait()
        subprocess.run(["scancel", self.number], env=self._environment)
