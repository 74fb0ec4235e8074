"""The device's own clock: with events that a test plays, and on a GPU with real ones."""

from __future__ import annotations

import json
import time

import pytest
import torch

from batchmix.observability.device_clock import DeviceClock
from batchmix.observability.trace import Trace


class Event:
    """Of a device whose time the test sets. Ends when `Event.reached` has come to its time."""

    now = 0.0  # milliseconds at which the next event happens
    reached = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return self.at <= Event.reached

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_a_cpu_has_no_clock_of_its_own():
    clock = DeviceClock(torch.device("cpu"))
    with clock.work("decode"):
        pass
    assert clock.seconds() is None


def test_pieces_of_work_add_up_without_their_gaps_and_without_waiting(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(Event, "reached", float("inf")))
    clock = DeviceClock(torch.device("cuda"))
    with Trace(tmp_path / "trace.json") as clock.trace:
        for start, end in [(10, 30), (30, 35), (100, 200)]:
            Event.now = start
            with clock.work("decode", size=8):
                Event.now = end
            Event.reached = 32.0  # the host is ahead: later pieces are still open
        with pytest.raises(torch.OutOfMemoryError), clock.work("prefill"):
            raise torch.OutOfMemoryError
        assert len(clock._open) == 2
        assert clock.seconds() == pytest.approx(0.125)
    assert clock.steps() == {8: [3, 0.125]}
    spans = [event for event in json.loads((tmp_path / "trace.json").read_text()) if event["ph"] == "X"]
    assert [span["dur"] for span in spans] == [20_000, 5_000, 100_000]
    assert [span["ts"] - spans[0]["ts"] for span in spans] == pytest.approx(
        [0, 20_000, 90_000], abs=1
    )  # microseconds since 1970 as float64


@pytest.mark.gpu
def test_on_a_gpu_idle_time_is_not_counted():
    clock = DeviceClock(torch.device("cuda"))
    for _ in range(2):
        started = time.perf_counter()
        with clock.work("decode"):
            torch.cuda._sleep(20_000_000)
        torch.cuda.synchronize()
        took = time.perf_counter() - started
        time.sleep(3 * took)
    seconds = clock.seconds()
    assert seconds is not None
    assert took < seconds < 3 * took, "two pieces of about the same length"
