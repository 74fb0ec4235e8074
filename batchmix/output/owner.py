"""Which process holds a lease, and whether it is still there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

_SAME_START = 2.0  # seconds that two readings of a process's start may differ


@dataclass(frozen=True)
class Owner:
    """A process. `space`: within one, process ids can be compared; it changes with a reboot and with a container."""

    host: str
    pid: int
    started: float  # time.time()
    space: str

    @staticmethod
    def this_process() -> Owner:
        return Owner(os.uname().nodename, os.getpid(), psutil.Process().create_time(), _space())

    @property
    def here(self) -> bool:
        """Whether this process can see whether it is there."""
        return self.space == _space()

    @property
    def gone(self) -> bool:
        """Whether it is known to have ended."""
        if not self.here:
            return False
        try:
            process = psutil.Process(self.pid)
            ended = bool(process.status() == psutil.STATUS_ZOMBIE)
            return ended or bool(abs(process.create_time() - self.started) > _SAME_START)
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@cache
def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{os.uname().nodename} {psutil.boot_time():.0f}"
