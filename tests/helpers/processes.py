"""`batchmix generate` in processes of its own, to be watched, signalled and killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset as ds

TICKETS = Path(__file__).parents[2] / "examples" / "support_tickets.jsonl"
# Small parts and flushes, so that kills fall between commits, and few rows at once, so that a run takes seconds.
SETTINGS = ["sampling.max_tokens=24", "engine.max_num_seqs=16", "output.rows_per_shard=10", "output.flush_seconds=0.2"]


def start(data: Path, out: Path, *more: str, threads: int = 2, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "batchmix", "generate", f"data.path={data}", f"output.dir={out}", *SETTINGS, *more]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **options
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def read(out: Path) -> dict[int, tuple[Any, ...]]:
    rows = ds.dataset(out, format="arrow").to_table().to_pylist()
    found = {row["row"]: (row["id"], row["generated_text"], row["finish_reason"]) for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that a run has started, in the order of their start; their own too."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            if any("spawn_main" in word for word in child.cmdline()):
                found.append((child.create_time(), child.pid, child))
    return [child for _, _, child in sorted(found)]


def listening(pid: int) -> set[str]:
    """The addresses on which a process and all that it started take connections or datagrams."""
    found = set()
    with suppress(psutil.Error):  # it has ended
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                found |= {
                    socket.laddr.ip
                    for socket in member.net_connections("inet")
                    if socket.laddr and not socket.raddr and socket.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
                }
    return found
