"""A real Slurm on this machine: munged, slurmctld and slurmd with their files in one folder, gone at the end of the block.

Nothing of the system is touched: own ports, own munge key and socket. The node declares more CPUs than there are, so that
the tasks of an array run side by side. Not for production: there is no accounting, and waits are short.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

CPUS = 4
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue", "srun")
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=30
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=64000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes={host} Default=YES State=UP GraceTime=30
PartitionName=urgent Nodes={host} PriorityTier=10 State=UP PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What of Slurm is not installed."""
    return [name for name in PROGRAMS if _which(name) is None]


@contextmanager
def one_node_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Gives the environment in which sbatch, squeue, scontrol and the jobs talk to this cluster. `folder` is empty."""
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir(mode=0o755)
    host = socket.gethostname().partition(".")[0]
    controller, node = _free_ports(2)
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(host=host, user=user, folder=folder, controller=controller, node=node, cpus=CPUS))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    environment |= {"SLURM_CONF": str(conf)}
    with ExitStack() as daemons:
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", "--num-threads=1", *files]
        daemons.enter_context(_daemon(munged, environment, folder))
        _wait(lambda: (folder / "munge.socket").exists(), "munged", folder)
        daemons.enter_context(_daemon(["slurmctld", "-D", "-c"], environment, folder))
        daemons.enter_context(_daemon(["slurmd", "-D", "-N", host], environment, folder))
        _wait(lambda: _state(environment).startswith("idle"), "the node", folder)
        try:
            yield environment
        finally:
            subprocess.run(["scancel", "--user", user, "--full"], env=environment, capture_output=True)
            with suppress(TimeoutError):
                _wait(lambda: not _out(["squeue", "-h", "-t", "running,completing"], environment), "the end", folder)


@contextmanager
def _daemon(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[None]:
    program = _which(command[0])
    assert program is not None
    with (folder / f"{command[0]}.out").open("wb") as log:
        process = subprocess.Popen([program, *command[1:]], stdout=log, stderr=log, env=environment)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _state(environment: dict[str, str]) -> str:
    return _out(["sinfo", "-h", "-o", "%t"], environment)


def _out(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def _wait(condition: Callable[[], bool], what: str, folder: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(
                f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in folder.glob("*.log")
            )
            raise TimeoutError(f"{what} did not come up within {seconds:.0f} s\n{logs}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


if (
    __name__ == "__main__"
):  # a shell in which sbatch works: python tests/helpers/one_node_slurm.py EMPTY_FOLDER [COMMAND ...]
    with one_node_slurm(Path(sys.argv[1])) as shell_environment:
        sys.exit(subprocess.run(sys.argv[2:] or ["bash"], env=shell_environment).returncode)
