"""Whole models side by side, in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset as ds
import pytest
from processes import TICKETS, finish, read, start, wait_for, workers

from batchmix.config import Config
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig, OnError, ShardConfig
from batchmix.output.config import Order, OutputConfig, Redo
from batchmix.pipeline import generate
from batchmix.sampling import SamplingConfig

TWO = "engine.data_parallel_size=2"


def tickets(path: Path, count: int) -> Path:
    path.write_text("\n".join(TICKETS.read_text(encoding="utf-8").splitlines()[:count]) + "\n", encoding="utf-8")
    return path


def job(path: Path, out: Path, workers: int, **groups: dict[str, Any]) -> Config:
    return Config(
        data=DataConfig(path=str(path), **groups.get("data", {})),
        sampling=SamplingConfig(**{"max_tokens": 20, "seed": 5, **groups.get("sampling", {})}),
        engine=EngineConfig(device="cpu", data_parallel_size=workers),
        output=OutputConfig(dir=str(out), **groups.get("output", {})),
        shard=ShardConfig(**groups.get("shard", {})),
    )


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow  # 5 s and more
def test_two_workers_are_one_run(tmp_path, capsys, caplog):
    data = tickets(tmp_path / "rows.jsonl", 40)
    generate(job(data, tmp_path / "one", 1))
    capsys.readouterr()
    caplog.clear()
    out = tmp_path / "two"
    with caplog.at_level("INFO"):
        generate(job(data, out, 2, output={"order": Order.input, "rows_per_shard": 15}))
    assert read(out) == read(tmp_path / "one")
    files = sorted(str(path) for path in out.glob("part-*"))
    assert ds.dataset(files, format="arrow").to_table()["row"].to_pylist() == list(range(40))
    assert (out / ".batchmix/SUCCESS").exists()
    one, two = (json.loads((folder / ".batchmix/summary.json").read_text()) for folder in (tmp_path / "one", out))
    for key in ("rows", "error_rows", "samples", "prompt_tokens", "completion_tokens", "finish_reasons"):
        assert two[key] == one[key]
    (run,) = two["runs"]
    assert (run["rows"], run["completion_tokens"]) == (40, two["completion_tokens"])
    assert run["seconds"]["decode"] > 0
    assert run["seconds"]["write"] > 0
    assert run["generate_seconds"] > 0
    metrics = [json.loads(line) for line in (out / ".batchmix/metrics.jsonl").read_text().splitlines()]
    assert {line["shard"] for line in metrics} == {0}
    assert (metrics[-1]["rows"], metrics[-1]["prompt_tokens"]) == (40, two["prompt_tokens"])
    started = [record.getMessage() for record in caplog.records if record.name == "batchmix.engine.build"]
    assert len(started) == 1, "one line says what was started, whatever the number of workers"
    assert " on 2 x cpu" in started[0]
    assert capsys.readouterr().out.startswith("40 rows (")
    generate(job(data, out, 2))  # complete: starts nothing, else it would take seconds


@pytest.mark.slow  # starts eleven processes
def test_shards_errors_and_redone_rows(tmp_path):
    data = tickets(tmp_path / "rows.jsonl", 30)
    with data.open("a") as file:
        file.write("{broken\n")
    generate(job(data, tmp_path / "one", 1))
    expected = read(tmp_path / "one")
    out = tmp_path / "shards"
    for index in (1, 0):
        assert not (out / ".batchmix/SUCCESS").exists()
        generate(job(data, out, 2, shard={"index": index, "count": 2}))
    assert read(out) == expected
    assert (out / ".batchmix/SUCCESS").exists()
    longer = {"max_tokens": 30}
    for workers_, folder in ((1, tmp_path / "one"), (3, out)):
        generate(job(data, folder, workers_, sampling=longer, output={"redo": Redo.length}))
    assert read(out) == read(tmp_path / "one") != expected
    with pytest.raises(BatchmixError, match=r"row 30: .*\(data\.on_error=raise\)"):
        generate(job(data, tmp_path / "strict", 2, data={"on_error": OnError["raise"]}))
    strict = read(tmp_path / "strict") if list((tmp_path / "strict").glob("part-*")) else {}
    assert strict.items() <= expected.items()
    generate(job(data, tmp_path / "strict", 1))
    assert read(tmp_path / "strict") == expected


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tickets(tmp_path_factory.mktemp("data") / "rows.jsonl", 300)


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, ...]]:
    """The answers of one process that nobody disturbs, sampled at temperature 1."""
    out = tmp_path_factory.mktemp("undisturbed")
    code, output = finish(start(data, out, threads=1))
    assert code == 0, output
    return read(out)


@pytest.mark.slow  # kills processes of runs that take ten seconds
@pytest.mark.parametrize("again", [1, 3])
def test_a_killed_worker(data, tmp_path, expected, again):
    out = tmp_path / "out"
    process = start(data, out, TWO)
    wait_for(lambda: list(out.glob("part-*")), process)
    killed = workers(process)[1]
    killed.kill()
    code, output = finish(process)
    assert code == 1, output
    last = output.strip().splitlines()[-1]
    assert last == (
        f"batchmix: error: data-parallel worker 1 of 2 (process {killed.pid}) was killed by SIGKILL, as the kernel does when"
        " memory runs out; what was committed is safe, run the command again for the rest"
    )
    assert "Traceback" not in output
    assert not (out / ".batchmix/SUCCESS").exists()
    kept = read(out)
    assert 0 < len(kept) < 300
    assert kept.items() <= expected.items()
    code, output = finish(start(data, out, f"engine.data_parallel_size={again}"))
    assert code == 0, output
    assert read(out) == expected
    assert not list(out.glob(".part*"))


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True], ids=["parent", "group"])
def test_a_signal_commits_and_exits_75(data, tmp_path, expected, to_all):
    out = tmp_path / "out"
    process = start(data, out, TWO, "output.flush_seconds=1000", "output.rows_per_shard=20", start_new_session=True)
    wait_for(lambda: list(out.glob("part-*")), process)
    if to_all:
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
    else:
        process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    assert f"interrupted by {'SIGINT' if to_all else 'SIGTERM'}, run the same command again" in output
    assert "Traceback" not in output
    kept = read(out)
    assert 20 < len(kept) < 300, "what was finished since the first part must be there, and the run must not be over"
    code, output = finish(start(data, out, TWO))
    assert code == 0, output
    assert read(out) == expected


@pytest.mark.slow
def test_signals_while_workers_start(data, tmp_path):
    for wait in (0.0, 0.5, 1.5):
        process = start(data, tmp_path / "out", TWO, start_new_session=True)
        wait_for(lambda: workers(process), process)  # noqa: B023
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)
        code, output = finish(process)
        assert code == 75, output
        assert "Traceback" not in output


@pytest.mark.slow
def test_what_a_killed_parent_leaves_behind_commits_nothing(data, tmp_path, expected):
    out = tmp_path / "out"
    process = start(data, out, TWO)
    wait_for(lambda: list(out.glob("part-*")), process)
    left = workers(process)
    left[0].suspend()  # so that it cannot notice
    process.kill()
    left[1].wait(timeout=20)
    code, output = finish(start(data, out, TWO))
    assert code == 0, output
    left[0].resume()
    psutil.wait_procs(left, timeout=20)
    process.communicate()
    assert read(out) == expected


@pytest.mark.slow  # starts five processes
def test_whole_models_of_two_slices_each(data, tmp_path, expected):
    slices = [
        "model.tensor_parallel_size=2",
        "model.dtype=float32",
    ]  # other sums than one process has: near ties may differ
    code, output = finish(start(data, tmp_path / "plain", *slices, threads=2))
    assert code == 0, output
    more = [TWO, *slices]
    out = tmp_path / "out"
    process = start(data, out, *more, threads=4)
    wait_for(lambda: list(out.glob("part-*")), process)
    follower = workers(process)[-1]
    follower.kill()
    code, output = finish(process)
    assert code == 1, output
    assert "batchmix: error: tensor-parallel rank 1 of 2 (process" in output.strip().splitlines()[-1]
    code, output = finish(start(data, out, *more, threads=4))
    assert code == 0, output
    assert read(out) == read(tmp_path / "plain")


SCRIPT = """
import batchmix
from batchmix import LLM, SamplingParams

print("the script runs")
llm = LLM("tiny", device="cpu", tensor_parallel_size=2)
print(llm.generate("Hello", SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)[0].outputs[0].finish_reason)
llm.close()
run = batchmix.run("generate", {"data.path": "rows.jsonl", "output.dir": "out", "data.limit": 8, "sampling.max_tokens": 4,
                                "engine.device": "cpu", "engine.data_parallel_size": 2})
print(len(run.table()), __file__)
"""


@pytest.mark.slow  # starts four processes
def test_a_script_needs_no_guard_of_its_main(data, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(Path(data).read_bytes())
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("the script runs") == 1
    assert "length" in lines
    assert lines[-1] == f"8 {tmp_path / 'script.py'}" or lines[-1] == "8 script.py"
