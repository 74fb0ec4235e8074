"""Several workers, one output folder: status, finalize, and a worker that is stopped for too long."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import TICKETS, finish, read, start, wait_for

from batchmix.cli import main
from batchmix.config import Config, DataConfig, EngineConfig, OutputConfig, SamplingConfig, ShardConfig
from batchmix.data.lease import CLOSED, Lease, Record, shard_name
from batchmix.data.owner import Owner
from batchmix.data.storage import open_storage
from batchmix.pipeline import generate
from batchmix.report.status import ShardStatus, Status


def batchmix(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    captured = capsys.readouterr()
    if arguments[0] == "status":
        assert all(len(line) <= 80 for line in captured.out.splitlines())
    return code, captured.out + captured.err


def job(path: Path, out: str, index: int, count: int) -> Config:
    return Config(
        data=DataConfig(path=str(path)),
        sampling=SamplingConfig(max_tokens=2, temperature=0.0),
        engine=EngineConfig(device="cpu"),
        output=OutputConfig(dir=out, rows_per_shard=2),
        shard=ShardConfig(index, count),
    )


@pytest.mark.parametrize("where", ["folder", "memory://store"])
def test_status_and_finalize(tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(TICKETS.read_text().splitlines(keepends=True)[:7]) + "{broken\n")
    out = f"{tmp_path}/out" if where == "folder" else f"{where}{tmp_path}"
    place = f"output.dir={out}"
    code, text = batchmix(capsys, "status", place)
    assert (code, text) == (1, f"batchmix: error: {place}: holds no _run.json, so no run of batchmix has begun there\n")
    generate(job(data, out, 1, 3))
    capsys.readouterr()
    code, text = batchmix(capsys, "status", place)
    assert code == 4
    assert [line.split() for line in text.splitlines()] == [
        ["shard", "done", "failed", "left", "rows/s", "worker"],
        ["0/3", "0", "0", "3", "-", "not", "started"],
        ["1/3", "3", "1", "0", "-", "done"],
        ["2/3", "0", "0", "2", "-", "not", "started"],
        ["all", "3", "1", "5", "0.0"],
        "0 of 3 workers alive, 2 shards wait for a worker".split(),
    ]
    workers = [Lease(open_storage(out), shard_name(i, 3), ShardConfig(i, 3), f"shard {i} of 3") for i in (0, 2)]
    code, text = batchmix(capsys, "status", place)
    assert code == 3
    assert f"0/3           0        0           3     0.0  alive, {os.getpid()} on {os.uname().nodename}"[:70] in text
    assert text.splitlines()[-1] == "2 of 3 workers alive"
    code, text = batchmix(capsys, "finalize", place)
    assert (code, "is writing shard 0 of 3 there" in text) == (1, True), text
    for worker in workers:
        worker.close()
    code, text = batchmix(capsys, "finalize", place)
    assert code == 1
    assert f"{place}: 5 of 8 rows are not done (0, 2, 3, 5, 6)" in text
    for index in range(2):
        generate(job(data, out, index, 2))
    capsys.readouterr()
    assert batchmix(capsys, "status", place)[0] == 0
    code, text = batchmix(capsys, "finalize", place, "output.order=input")
    assert code == 0
    assert "each of 8 rows is there once; _SUCCESS is written" in text
    assert "complete: _SUCCESS is there" in batchmix(capsys, "status", place)[1]
    if where == "folder":
        folder = Path(out)
        part = sorted(folder.glob("part-*"))[-1]
        (folder / "part-00007-000099.arrow").write_bytes(part.read_bytes())
        code, text = batchmix(capsys, "finalize", place)
        assert code == 1
        assert "is there twice, in part-" in text


def test_exit_codes() -> None:
    here = Record("00000-of-00002", 1, Owner.this_process(), heartbeat=time.time())
    silent = dataclasses.replace(here, heartbeat=time.time() - 40)
    ended = dataclasses.replace(here, state=CLOSED)

    def code(*shards: tuple[int | None, Record | None], complete: bool = False) -> int:
        found = [ShardStatus(index, len(shards), 5, 0, left, lease) for index, (left, lease) in enumerate(shards)]
        return Status("out", complete, found, None).exit_code

    assert code((0, ended), (0, ended), complete=True) == 0
    assert code((3, here), (None, here)) == code((0, ended), (0, here)) == 3
    assert code((0, ended), (0, ended)) == code((3, None), (0, here)) == code((3, silent), (3, here)) == 4
    assert code((None, ended), (3, here)) == code((0, silent), (0, here)) == 4


@pytest.mark.slow  # starts five processes, and waits until one of them has been silent for long enough
def test_a_stopped_worker_is_reported_taken_over_and_refused(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(TICKETS.read_text().splitlines(keepends=True)[:400]))
    expected = tmp_path / "undisturbed"
    code, output = finish(start(data, expected))
    assert code == 0, output
    out = tmp_path / "out"
    half = ["shard.count=2", "shard.heartbeat_seconds=0.5", "shard.takeover_seconds=6"]

    def shard(index: int) -> subprocess.Popen[str]:
        return start(data, out, f"shard.index={index}", *half, threads=1)

    def status() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "batchmix", "status", f"output.dir={out}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    stuck = shard(0)
    wait_for(lambda: list(out.glob("part-00000-*")), stuck)
    stuck.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    other = shard(1)
    reported = ""
    while "stuck: no heartbeat for" not in reported:
        assert time.monotonic() < stopped + 60
        found = status()
        reported = found.stdout
    assert found.returncode == 4
    code, output = finish(other)
    assert code == 0, output
    time.sleep(max(0.0, stopped + 6.5 - time.monotonic()))
    code, output = finish(shard(0))
    assert code == 0, output
    assert (out / "_SUCCESS").exists()
    assert read(out) == read(expected)
    stuck.send_signal(signal.SIGCONT)
    code, output = finish(stuck)
    assert code == 1, output
    assert "shard index 0 was taken over" in output or "shard 0 of 2 was taken over by process" in output
    assert "Traceback" not in output
    assert read(out) == read(expected)
    assert status().returncode == 0
    code, output = finish(shard(0))
    assert (code, "nothing to do" in output) == (0, True), output
