"""Reader threads: what they do about errors and interruptions, what they say, and how much memory they take."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batchmix.checkpoints.reading import fill
from batchmix.checkpoints.staging import Direct
from batchmix.checkpoints.targets import DenseTarget
from batchmix.errors import BatchmixError, Interrupted
from batchmix.models.tensor_parallel import SINGLE_RANK, TensorParallel
from batchmix.observability.loading import LoadProgress

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Counted:
    """Tensors 0, 1, 2, ... of 4 x 6; remembers what was read and what was released."""

    def __init__(self, count: int, before: Callable[[str], None] = lambda name: None) -> None:
        self.tensors = {str(k): torch.full((4, 6), float(k)) for k in range(count)}
        self.read_names: list[str] = []
        self.released: list[str] = []
        self._before = before

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        self._before(name)
        self.read_names.append(name)
        return self.tensors[name]

    def release(self, name: str) -> None:
        self.released.append(name)


def places(source: Counted, tp: TensorParallel = SINGLE_RANK, columns: int = 6) -> dict[str, DenseTarget]:
    return {name: DenseTarget((4, 6), torch.zeros(4, columns), torch.float32, tp, Direct()) for name in source.tensors}


def progress() -> LoadProgress:
    return LoadProgress("loading", 1000, 1000)


def test_every_place_gets_its_slice_and_every_tensor_is_released() -> None:
    source = Counted(50)
    its = places(source, TensorParallel(1, 3), columns=2)
    threads = torch.get_num_threads()
    fill(source, its, progress(), readers=4)
    assert torch.get_num_threads() == threads
    for name, place in its.items():
        assert torch.equal(place.target, source.tensors[name][:, 2:4])
    assert sorted(source.released) == sorted(source.read_names) == sorted(source.tensors)


@pytest.mark.parametrize("error", [BatchmixError("x.safetensors: the disk is gone"), RuntimeError("a bug")])
def test_the_first_error_ends_it(error: Exception) -> None:
    def before(name: str) -> None:
        if name == "5":
            raise error
        time.sleep(0.001)

    source = Counted(1000, before)
    with pytest.raises(type(error), match=str(error)):
        fill(source, places(source), progress(), readers=3)
    assert len(source.read_names) < 100
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-weights")]


def test_an_interruption_ends_it() -> None:
    class Stopped(LoadProgress):
        def count(self, elements: int) -> None:
            raise Interrupted("SIGTERM")

    source = Counted(1000, lambda name: time.sleep(0.001))
    with pytest.raises(Interrupted):
        fill(source, places(source), Stopped("loading", 1, 1), readers=3)
    assert len(source.read_names) < 100


def test_a_shape_that_does_not_fit_is_found_before_anything_is_read() -> None:
    source = Counted(3)
    source.tensors["2"] = torch.zeros(4, 5)
    with pytest.raises(BatchmixError, match=r"tensor 2 is \[4, 5\], not \[4, 6\]"):
        fill(source, places(source), progress())
    assert not source.read_names


def test_lines_say_how_far_and_how_fast(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    monkeypatch.setattr("batchmix.observability.loading.time.monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    with LoadProgress("loading weights", 90_000_000_000, 45_000) as progress:  # 2 MB for each element
        for seconds in (1, 4, 7, 20, 38):
            now[0] = 100.0 + seconds
            progress.count(5_000)
    assert [record.message for record in caplog.records] == [
        "loading weights: 30.0 of 90.0 GB (33%), 4.29 GB/s",
        "loading weights: 50.0 of 90.0 GB (56%), 1.32 GB/s",
    ]


def test_a_terminal_sees_a_bar_in_bytes_per_second(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with LoadProgress("loading weights", 90_000_000_000, 90) as progress:
        progress.count(90)
    shown = capsys.readouterr().err
    assert "loading weights: 100%" in shown
    assert "90.0G/90.0G" in shown
    assert "B/s" in shown


LOAD = """
import json, sys, torch
from pathlib import Path
from bench_load import load_once, save_random
from safetensors.torch import load_file
layout, folder = sys.argv[1], Path(sys.argv[2])
if not folder.exists():
    save_random(folder, layout.removesuffix(" pth"), float(sys.argv[3]))
    if layout.endswith("pth"):
        torch.save(load_file(folder / "consolidated.safetensors"), folder / "consolidated.00.pth")
        (folder / "consolidated.safetensors").unlink()
else:
    print(json.dumps(load_once(folder, torch.device("cpu"), 4, cold=False)))
"""


@pytest.mark.slow  # writes and reads 4 GB
@pytest.mark.parametrize(("layout", "gigabytes"), [("hub", 2.0), ("fused", 1.0), ("mistral pth", 1.0)])
def test_the_host_holds_little_beside_the_weights(tmp_path: Path, layout: str, gigabytes: float) -> None:
    """Less than 0.5 GB of anything beside the tensors' final place, mapped file pages counted."""
    environment = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", LOAD, layout, str(tmp_path / "model"), str(gigabytes)]
    for _ in ("write", "load"):  # each in a process that has held nothing before
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(layout, found)
    assert -0.05 < found["anonymous_gb_beside_the_weights"] < 0.25
    assert 0 <= found["file_gb"] < 0.5
    assert found["resident_gb_beside_the_weights"] < 0.5
