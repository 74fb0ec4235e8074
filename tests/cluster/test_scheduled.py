"""jobs/slurm/scheduled.sh with real files and no Slurm: which files a run takes, and that none is taken twice or lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from processes import SETTINGS, TICKETS, wait_for

OUT = "it's out"
SCRIPT = Path(__file__).parents[2] / "jobs" / "slurm" / "scheduled.sh"
LINES = TICKETS.read_text(encoding="utf-8").splitlines(keepends=True)

pytestmark = pytest.mark.slow  # runs of a model, a few seconds each


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "batchmix"
    program.write_text(f'#!/bin/bash\nexec {sys.executable} -m batchmix "$@"\n')
    program.chmod(0o755)
    return tmp_path


def put(place: Path, name: str, first: int, count: int, age: float = 100) -> Path:
    path = place / "in" / name
    path.write_text("".join(LINES[first : first + count]), encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)
    return path


def start(place: Path, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [str(SCRIPT), str(place / "in"), str(place / OUT), *SETTINGS, "data.id_column=id", *more]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(place: Path, *more: str) -> str:
    process = start(place, *more)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def answers(place: Path) -> list[list[str]]:
    """The ids of the tickets that each run has answered, runs by their date."""
    folders = sorted(path.parents[1] for path in (place / OUT).glob("*/.batchmix/SUCCESS"))
    return [sorted(ds.dataset(folder, format="arrow").to_table()["id"].to_pylist()) for folder in folders]


def ids(*ranges: range) -> list[str]:
    return sorted(str(json.loads(LINES[number])["id"]) for numbers in ranges for number in numbers)


def test_each_file_once(place: Path) -> None:
    put(place, "a.jsonl", 0, 10)
    put(place, "it's b.jsonl", 10, 10)
    put(place, "README.md", 0, 1)
    put(place, "young.jsonl", 20, 10, age=0)  # somebody may still be writing it
    assert "2 files" in run(place)
    assert answers(place) == [ids(range(20))]
    assert "no new files" in run(place)
    put(place, "young.jsonl", 20, 10)
    assert "1 files" in run(place)
    put(place, "a.jsonl", 30, 10, age=90)  # another size and time: another file
    assert "1 files" in run(place)
    assert answers(place) == [ids(range(20)), ids(range(20, 30)), ids(range(30, 40))]
    assert "no new files" in run(place)


def test_an_interrupted_run_is_finished_first(place: Path) -> None:
    put(place, "a.jsonl", 0, 100)
    process = start(place, "engine.max_num_seqs=1")
    wait_for(lambda: list((place / OUT).glob("*/part-*")), process)
    put(place, "b.jsonl", 100, 10)
    assert "another run is at work" in run(place)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "1 files" in run(place)
    assert answers(place) == [ids(range(100))]
    assert "1 files" in run(place)
    assert answers(place) == [ids(range(100)), ids(range(100, 110))]


def test_a_file_that_changes_under_an_unfinished_run(place: Path) -> None:
    put(place, "a.jsonl", 0, 10)
    process = start(place, "model.path=nowhere.such")
    assert process.wait(60) == 1
    put(place, "a.jsonl", 0, 11)
    process = start(place)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "have changed or gone; delete it and" in output


def test_settings_that_would_leave_rows_out_are_refused(place: Path) -> None:
    put(place, "a.jsonl", 0, 3)
    process = start(place, "data.limit=2")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, "data.limit=2: each run has all rows" in output) == (2, True), output
    assert not list((place / OUT / ".runs").glob("*.tsv"))


def test_without_batchmix_on_the_path_no_run_is_begun(place: Path) -> None:
    put(place, "a.jsonl", 0, 3)
    command = [str(SCRIPT), str(place / "in"), str(place / OUT)]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 127
    assert "there is no batchmix on PATH (/usr/bin:/bin); under cron set PATH" in done.stderr
    assert not list((place / OUT / ".runs").glob("*.tsv"))
