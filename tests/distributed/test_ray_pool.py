"""What the driver of `cluster=ray` does about workers that are lost, with a stand-in for Ray; `tests/cluster/` has Ray."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from batchmix.config import Config
from batchmix.distributed import ray_pool
from batchmix.distributed.config import ClusterConfig, ClusterKind
from batchmix.distributed.engine_worker import Report
from batchmix.distributed.ray_pool import RayPool
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.records import Completion, InputRow, Prompt
from batchmix.sampling import SamplingConfig

SAMPLES = 2


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Remote:
    """A method of an actor: `method.remote(...)`."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call

    def options(self, **_: Any) -> Remote:
        return self


class Actor:
    """Answers what it is fed, three samples at a time, and is gone after `life` of them."""

    def __init__(self, life: float, load: Callable[[], None]) -> None:
        self.life, self.units = life, []
        self.load = Remote(lambda *_: load)
        self.feed = Remote(lambda rows: self.units.append(rows))
        self.run = Remote(self.answers)

    def answers(self) -> Iterator[Callable[[], Any]]:
        rows = [row for unit in self.units for row in unit]
        self.units = []
        samples = [answer(row, sample) for row in rows for sample in range(SAMPLES)]
        while samples:
            yield lambda: self.some(samples)

    def some(self, samples: list[Completion]) -> tuple[list[Completion], Report]:
        if self.life <= 0:
            raise RayError("the node is gone")
        self.life -= 3
        some, samples[:] = samples[:3], samples[3:]
        return some, Report()


def answer(row: InputRow, sample: int) -> Completion:
    prompt = Prompt(row.row, row.id, {}, [1], SamplingConfig(n=SAMPLES))
    if row.row % 7 == 3:  # a grammar that the host follows may leave each sample without an answer
        return Completion.failed(prompt, "cut off", sample)
    return Completion(prompt, sample, [row.row, sample], "stop", num_tokens=2)


class Ray(ModuleType):
    def __init__(self, lives: list[float], load: Callable[[], None] = lambda: None) -> None:
        super().__init__("ray")
        self.lives, self.load, self.started, self.killed = iter(lives), load, 0, 0
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.init = self.shutdown = lambda **_: None

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2}

    def remote(self, _: type) -> Remote:
        def start(*_: object) -> Actor:
            self.started += 1
            return Actor(next(self.lives), self.load)

        return Remote(start)

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        assert 0 < num_returns <= len(references)
        return references, []

    def get(self, reference: Callable[[], Any]) -> Any:
        return reference()

    def kill(self, actor: Actor) -> None:
        self.killed += 1


def answers(ray: Ray, monkeypatch: pytest.MonkeyPatch, num_rows: int, stop_after: int = 10**9) -> list[Completion]:
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
    monkeypatch.setattr(ray_pool, "_LOOK_EVERY", 0.01)
    monkeypatch.setattr(ray_pool, "PAUSE", 0.01)
    monkeypatch.setattr(ray_pool, "_PATIENCE", 0.0)
    config = Config(cluster=ClusterConfig(ClusterKind.ray, rows_per_unit=4), engine=EngineConfig(device="cpu"))
    rows = (InputRow(number, str(number), {"text": f"t{number}", "not kept": 0}) for number in range(num_rows))
    found: list[Completion] = []
    with RayPool(config, "model", ["text"], lambda: len(found) >= stop_after, lambda _: None) as pool:
        found += pool.run(rows)
    return found


@pytest.mark.parametrize("lives", [[1e9] * 2, [9, 1e9, 1e9], [3, 3, 9, 9, 9, 9, 1e9, 1e9], [0, 0, 0, 1e9, 1e9]])
def test_every_sample_comes_once_whoever_is_lost(monkeypatch: pytest.MonkeyPatch, lives: list[float]) -> None:
    ray = Ray(lives)
    found = answers(ray, monkeypatch, num_rows=41)
    samples = [(completion.prompt.row, completion.sample_index) for completion in found]
    assert sorted(samples) == [(row, sample) for row in range(41) for sample in range(SAMPLES)]
    # A row's samples come together, as the sink's memory is for whole rows, and with the columns that the output keeps.
    assert samples[::SAMPLES] == [(row, 0) for row, sample in samples if sample == 1]
    assert all(completion.prompt.columns == {"text": f"t{completion.prompt.row}"} for completion in found)
    assert ray.killed == ray.started, "no worker is left"


def test_workers_that_only_die_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BatchmixError, match=r"5 workers were lost one after the other.*the node is gone"):
        answers(Ray([0] * 100), monkeypatch, num_rows=41)


def test_an_error_that_a_user_can_mend_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise RayTaskError(BatchmixError("model.path=nowhere: no such folder"))

    with pytest.raises(BatchmixError, match=r"^model\.path=nowhere: no such folder$"):
        answers(Ray([1e9] * 2, load), monkeypatch, num_rows=41)


def test_no_rows_start_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers(Ray([]), monkeypatch, num_rows=0) == []
