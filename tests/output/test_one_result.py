"""Several workers, one output folder: status, finalize, and a worker that is stopped for too long."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from processes import TICKETS, finish, read, start, wait_for

from batchmix import pipeline
from batchmix.config import Config
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig, ShardConfig
from batchmix.observability.engine_stats import EngineStats
from batchmix.observability.progress import Progress
from batchmix.output.config import Order, OutputConfig
from batchmix.output.lease import CLOSED, Lease, Record, shard_name
from batchmix.output.owner import Owner
from batchmix.output.status import ShardStatus, Status
from batchmix.output.stored_run import finalize_folder, read_status
from batchmix.pipeline import generate
from batchmix.sampling import SamplingConfig
from batchmix.storage import open_storage, write_json


def command(name: str, out: str | Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "batchmix", name, f"output.dir={out}", *overrides]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def job(path: Path, out: str, index: int, count: int) -> Config:
    return Config(
        data=DataConfig(path=str(path)),
        sampling=SamplingConfig(max_tokens=2, temperature=0.0),
        engine=EngineConfig(device="cpu"),
        output=OutputConfig(dir=out, rows_per_shard=2),
        shard=ShardConfig(index, count),
    )


@pytest.mark.parametrize("where", ["folder", pytest.param("memory://store", marks=pytest.mark.slow)])
def test_status_and_finalize(tmp_path: Path, where: str) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(TICKETS.read_text().splitlines(keepends=True)[:7]) + "{broken\n")
    out = f"{tmp_path}/out" if where == "folder" else f"{where}{tmp_path}"
    folder = Config(output=OutputConfig(dir=out))

    def status() -> tuple[int, list[str]]:
        found = read_status(folder)
        lines = found.text().splitlines()
        assert all(len(line) <= 80 for line in lines if line.split()[0] in ("shard", "all") or "/" in line.split()[0])
        return found.exit_code, lines

    with pytest.raises(
        BatchmixError, match=f"output.dir={out}: holds no .batchmix/run.json, so no run of batchmix has begun"
    ):
        read_status(folder)
    generate(job(data, out, 1, 3))
    code, lines = status()
    assert code == 4
    reasons = lines.index("failed rows by reason, with an example:")
    assert lines[reasons + 1].startswith("       1  row 7: ")
    assert [line.split() for line in lines[:reasons] + lines[reasons + 2 :]] == [
        ["shard", "done", "failed", "left", "rows/s", "worker"],
        ["0/3", "0", "0", "3", "-", "not", "started"],
        ["1/3", "3", "1", "0", "-", "done"],
        ["2/3", "0", "0", "2", "-", "not", "started"],
        ["all", "3", "1", "5", "0.0"],
        "0 of 3 workers alive, 2 shards wait for a worker".split(),
    ]
    workers = [Lease(open_storage(out), shard_name(i, 3), ShardConfig(i, 3), f"shard {i} of 3") for i in (0, 2)]
    code, lines = status()
    assert code == 3
    assert lines[1].startswith(f"    0/3           0        0           3     0.0  alive, {os.getpid()} on ")
    assert lines[-1] == "2 of 3 workers alive"
    with pytest.raises(BatchmixError, match="is writing shard 0 of 3 there"):
        finalize_folder(folder)
    for worker in workers:
        worker.close()
    with pytest.raises(BatchmixError, match=r"5 of 8 rows are not done \(0, 2, 3, 5, 6\)"):
        finalize_folder(folder)
    for index in range(2):
        generate(job(data, out, index, 2))
    assert status()[0] == 0
    folder.output.order = Order.input
    assert f"each of 8 rows is there once; {out}/.batchmix/SUCCESS is written" in finalize_folder(folder)
    assert status()[1][-1] == "complete: every row is there"
    if where == "folder":
        lost = sorted(Path(out).glob("part-*"))[0]
        kept, gone = lost.read_bytes(), len(rows_of(lost))
        lost.unlink()
        code, lines = status()
        assert code == 4
        assert (
            lines[-1]
            == f"{gone} rows of the finished run are not in its parts any more: run the generate command again"
        )
        with pytest.raises(BatchmixError, match=f"{gone} of 8 rows are not done"):
            finalize_folder(folder)
        assert not (Path(out) / ".batchmix" / "SUCCESS").exists()
        lost.write_bytes(kept)
        finalize_folder(folder)
        lost.unlink()
        # As who takes over a lost worker leaves it.
        lost.with_name("part-00009-000001.arrow").write_bytes(empty_of(kept))
        again = job(data, out, 0, 1)
        again.output.order = Order.input
        generate(again)
        assert status()[0] == 0
        assert [row for path in sorted(Path(out).glob("part-*")) for row in rows_of(path)] == list(range(8))
        part = next(path for path in sorted(Path(out).glob("part-*")) if rows_of(path))
        (Path(out) / "part-00007-000099.arrow").write_bytes(part.read_bytes())
        with pytest.raises(BatchmixError, match="is there twice, in part-"):
            finalize_folder(folder)


def test_another_number_of_shards_counts_its_own_rows_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(TICKETS.read_text().splitlines(keepends=True)[:9]))
    generate(job(data, str(tmp_path / "out"), 0, 3))  # rows 0, 3, 6
    begun: list[tuple[int | None, int]] = []

    class Watched(Progress):
        def __init__(self, total: int | None, done: int, stats: EngineStats) -> None:
            begun.append((total, done))
            super().__init__(total, done, stats)

    monkeypatch.setattr(pipeline, "Progress", Watched)
    generate(job(data, str(tmp_path / "out"), 1, 2))  # rows 1, 3, 5, 7
    assert begun[0][1] == 1


def empty_of(part: bytes) -> bytes:
    table = pa.ipc.open_file(part).read_all()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table[:0])
    content: bytes = sink.getvalue().to_pybytes()
    return content


def rows_of(path: Path) -> list[int]:
    rows: list[int] = ds.dataset(path, format="arrow").to_table()["row"].to_pylist()
    return rows


def test_exit_codes() -> None:
    here = Record("00000-of-00002", 1, Owner.this_process(), heartbeat=time.time())
    silent = dataclasses.replace(here, progress={"silent": 40})
    ended = dataclasses.replace(here, state=CLOSED)

    def code(*shards: tuple[int | None, Record | None], complete: bool = False) -> int:
        silence = [0.0 if lease is None else lease.progress.get("silent", 0.0) for _, lease in shards]
        found = [ShardStatus(index, len(shards), 5, 0, left, lease, silence[index])
                 for index, (left, lease) in enumerate(shards)]  # fmt: skip
        return Status("out", complete, found, None).exit_code

    assert code((0, ended), (0, ended), complete=True) == 0
    assert code((3, here), (None, here)) == code((0, ended), (0, here)) == 3
    assert code((0, ended), (0, ended)) == code((3, None), (0, here)) == code((3, silent), (3, here)) == 4
    assert code((None, ended), (3, here)) == code((0, silent), (0, here)) == 4


def test_status_trusts_no_other_machines_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers elsewhere, whose clocks are a day ahead and a day behind; the latter alone still beats."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(TICKETS.read_text().splitlines(keepends=True)[:2]))
    out = tmp_path / "out"
    generate(job(data, str(out), 0, 2))
    storage = open_storage(str(out))

    def write(index: int, ahead: float, beats: int) -> None:
        owner = Owner("node7", 4711, time.time() + ahead, "another boot")
        record = Record(shard_name(index, 2), 2, owner, started=time.time() + ahead, heartbeat=time.time() + ahead,
                        beats=beats, heartbeat_seconds=0.4)  # fmt: skip
        write_json(storage, record.path, dataclasses.asdict(record))

    write(0, 86400, 7)
    write(1, -86400, 7)
    sleep, beats = time.sleep, iter(range(8, 1000))

    def beat(seconds: float) -> None:
        sleep(seconds)
        write(1, -86400, next(beats))

    monkeypatch.setattr(time, "sleep", beat)
    lines = read_status(Config(output=OutputConfig(dir=str(out)))).text().splitlines()
    assert "stuck: no heartbeat for" in lines[1]
    assert "alive, 4711 on node7" in lines[2]


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

    stuck = shard(0)
    wait_for(lambda: list(out.glob("part-00000-*")), stuck)
    stuck.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    other = shard(1)
    reported = ""
    while "stuck: no heartbeat for" not in reported:
        assert time.monotonic() < stopped + 60
        found = command("status", out)
        reported = found.stdout
    assert found.returncode == 4
    code, output = finish(other)
    assert code == 0, output
    time.sleep(max(0.0, stopped + 6.5 - time.monotonic()))
    code, output = finish(shard(0))
    assert code == 0, output
    assert (out / ".batchmix/SUCCESS").exists()
    assert read(out) == read(expected)
    stuck.send_signal(signal.SIGCONT)
    code, output = finish(stuck)
    assert code == 1, output
    assert "shard index 0 was taken over" in output or "shard 0 of 2 was taken over by process" in output
    assert "Traceback" not in output
    assert read(out) == read(expected)
    assert command("status", out).returncode == 0
    found = command("finalize", out)
    assert (found.returncode, "each of 400 rows is there once" in found.stdout) == (0, True), found.stderr
    code, output = finish(shard(0))
    assert (code, "nothing to do" in output) == (0, True), output
