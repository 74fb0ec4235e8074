"""Real processes, real signals, a really full disk: promises 2 and 3."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from processes import TICKETS, finish, read, start, wait_for

pytestmark = pytest.mark.slow  # every run starts a process and loads torch, three seconds or more


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(TICKETS.read_text(encoding="utf-8").splitlines()[:300]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, ...]]:
    """The answers of a run that nobody disturbs, sampled at temperature 1."""
    out = tmp_path_factory.mktemp("undisturbed")
    code, output = finish(start(data, out))
    assert code == 0, output
    return read(out)


def test_twenty_kills(data, tmp_path, expected):
    moments, code, kills = random.Random(0), -1, 0
    while kills < 20:
        # Killed before its first row, between commits, or while it writes; late ones need rows to be left.
        process = start(data, tmp_path / "out", f"data.limit={15 * (kills + 1)}")
        time.sleep(moments.uniform(1.0, 4.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    while code != 0:
        code, output = finish(start(data, tmp_path / "out"))
        assert code == 0, output
    assert read(tmp_path / "out") == expected
    assert (tmp_path / "out" / ".batchmix/SUCCESS").exists()
    assert not list((tmp_path / "out").glob(".part*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_commits_and_exits_75(data, tmp_path, expected, number):
    out = tmp_path / "out"
    process = start(data, out, "output.flush_seconds=1000", "output.rows_per_shard=20")
    wait_for(lambda: list(out.glob("part-*")), process)
    time.sleep(0.5)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 75, output
    assert f"interrupted by {number.name}, run the same command again" in output
    assert "Traceback" not in output
    kept = read(out)
    assert 20 < len(kept) < 300, "what was finished since the first part must be there, and the run must not be over"
    code, output = finish(start(data, out))
    assert code == 0, output
    assert read(out) == expected


def test_a_signal_while_starting(data, tmp_path):
    process = start(data, tmp_path / "out")
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code in (75, -signal.SIGTERM), output  # the latter: Python was still importing
    assert "Traceback" not in output


def test_a_full_disk(data, tmp_path, expected):
    """RLIMIT_FSIZE makes writes beyond the limit fail as a full disk does, with EFBIG in the place of ENOSPC."""
    out = tmp_path / "out"
    code, output = finish(start(data, out, preexec_fn=lambda: limit_file_size(8_000)))
    last = output.strip().splitlines()[-1]
    assert code == 1, output
    assert last.startswith(f"batchmix: error: output.dir={out}: File too large; what was committed is safe"), output
    assert "Traceback" not in output
    code, output = finish(start(data, out))
    assert code == 0, output
    assert read(out) == expected


def limit_file_size(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_file_system(data, tmp_path, expected):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        out = small / "out"
        code, output = finish(start(data, out))
        assert code == 1, output
        last = output.strip().splitlines()[-1]
        assert last.startswith(f"batchmix: error: output.dir={out}: No space left on device"), output
        assert "Traceback" not in output
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        code, output = finish(start(data, out))
        assert code == 0, output
        assert read(out) == expected
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_two_writers(data, tmp_path, expected):
    out = tmp_path / "out"
    first = start(data, out)
    wait_for(lambda: (out / ".batchmix/metrics.jsonl").exists(), first)
    first.send_signal(signal.SIGSTOP)  # or it may be done before the second has loaded torch
    code, output = finish(start(data, out))
    assert code == 1, output
    assert f"another process (process {first.pid} on {os.uname().nodename}) is writing shard 0 of 1 there" in output
    code, output = finish(start(data, out, "shard.count=2"))
    assert code == 1, output
    assert f"another process (process {first.pid} on {os.uname().nodename}) is writing shard 0 of 1 there" in output
    first.send_signal(signal.SIGCONT)
    assert finish(first)[0] == 0
    assert read(out) == expected


def test_shards_at_the_same_time(data, tmp_path, expected):
    out = tmp_path / "out"
    processes = [start(data, out, "shard.count=3", f"shard.index={index}", "output.order=input") for index in range(3)]
    for process in processes:
        code, output = finish(process)
        assert code == 0, output
    assert read(out) == expected
    assert json.loads((out / ".batchmix/summary.json").read_text())["rows"] == 300
    files = sorted(str(path) for path in out.glob("part-*"))
    assert ds.dataset(files, format="arrow").to_table()["row"].to_pylist() == list(range(300))


INTERRUPTED_IMPORT = """
import os, signal, sys
from batchmix.cli import main

class Interrupting:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.meta_path.remove(self)
            {how}

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.{before})
sys.meta_path.insert(0, Interrupting())
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("how", "before", "code", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", "default_int_handler", 130, "batchmix: interrupted"),
        ("os.kill(os.getpid(), signal.SIGINT)", "SIG_IGN", 130, "batchmix: interrupted"),
        (
            "Last()",
            "default_int_handler",
            75,
            "batchmix: interrupted by SIGINT, run the same command again for the rest",
        ),
    ],
    ids=["heard", "ignored by the parent", "lost in a finaliser"],
)
def test_an_interrupt_while_modules_are_imported_ends_the_run(tmp_path, how, before, code, message):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    command = [sys.executable, "-c", INTERRUPTED_IMPORT.format(how=how, before=before), "generate",
               f"data.path={tmp_path / 'rows.jsonl'}", f"output.dir={tmp_path / 'out'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (code, [message]), done.stderr
    assert not (tmp_path / "out").exists()
