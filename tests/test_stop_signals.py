"""A stop signal is heard within seconds whatever waits: real processes, real signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import TICKETS, finish, start, wait_for

from batchmix.prompts.read_ahead import read_ahead

BLOCKED = """
import ctypes
from batchmix import signals as module
from batchmix.signals import StopSignals

module._PATIENCE = 0.2

with StopSignals() as signals:
    signals.defer()
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)  # for ever: signals do not end it
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_main_thread_that_hears_nothing_ends_the_process(number):
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(1.0)  # it is on its way into the lock
    process.send_signal(number)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, error) == (75, f"batchmix: interrupted by {number.name}\n")


def test_a_reader_that_waits_is_left_behind():
    stop, blocked = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 1
        blocked.wait(60)
        yield 2

    found = read_ahead(items(), 1, 1 << 20, lambda item: 1, stop.is_set)
    assert next(found) == 1
    threading.Timer(0.2, stop.set).start()
    started = time.monotonic()
    assert list(found) == []
    assert time.monotonic() - started < 10
    blocked.set()


@pytest.mark.slow  # starts processes that load torch
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_rows_that_are_costly_to_prepare_do_not_keep_a_run_from_its_end(tmp_path: Path, number) -> None:
    """Grammars of thousands of choices, and templates of many steps, for each row anew."""
    rows = [json.loads(line) for line in TICKETS.read_text(encoding="utf-8").splitlines()[:400]]
    for index, row in enumerate(rows[300:]):
        row["sampling"] = {"structured_outputs": {"choice": [f"c{index}x{j}" for j in range(20000)]}}
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    process = start(data, out, "output.flush_seconds=0.5")
    wait_for(lambda: list(out.glob("part-*")), process)
    sent = time.monotonic()
    process.send_signal(number)
    code, output = finish(process)
    assert code == 75, output
    assert time.monotonic() - sent < 15, output  # 5 on a machine of its own
    assert "Traceback" not in output
