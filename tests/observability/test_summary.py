"""Clock, progress, metrics and summary."""

from __future__ import annotations

import json
import logging
import threading
import time

import pytest

from batchmix.observability.clock import StageClock
from batchmix.observability.engine_stats import EngineStats
from batchmix.observability.metrics import Metrics
from batchmix.observability.progress import Progress, duration
from batchmix.observability.summary import RunStatistics, Summary
from batchmix.observability.totals import Totals
from batchmix.observability.trace import Trace
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig
from batchmix.storage import LocalFolder


def test_clock_adds_up_stages_of_all_threads():
    clock = StageClock()

    def work():
        with clock.stage("a"):
            time.sleep(0.05)
        with clock.stage("b"):
            pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.2 <= clock.seconds["a"] < 2
    assert clock.seconds["b"] < 0.05


def test_a_trace_has_a_span_for_each_time_of_a_stage_by_thread(tmp_path):
    clock = StageClock()
    with Trace(tmp_path / "trace.json") as clock.trace:
        with clock.stage("decode"):
            time.sleep(0.01)

        def write() -> None:
            with clock.stage("write"):
                pass

        thread = threading.Thread(target=write, name="sink")
        thread.start()
        thread.join()
        clock.trace.span("decode", 1.0, 1.5, thread="device")
    with clock.stage("late"):  # after the end: of no concern to the file
        pass
    events = json.loads((tmp_path / "trace.json").read_text())
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [(names[event["tid"]], event["name"], event["dur"]) for event in events if event["ph"] == "X"]
    assert [span[:2] for span in spans] == [("engine", "decode"), ("write", "write"), ("device", "decode")]
    assert spans[0][2] >= 10_000
    assert spans[2][2] == 500_000, "microseconds"


def completion(row: int, sample: int = 0, n: int = 1, error: str | None = None) -> Completion:
    prompt = Prompt(row, str(row), {}, [] if error else [1, 2, 3], SamplingConfig(n=n), error)
    return Completion.failed(prompt, error) if error else Completion(prompt, sample, [4, 5], "stop", num_tokens=3)


def test_totals_count_prompts_once_and_samples_each():
    totals = Totals()
    for sample in (1, 0):
        totals.count(completion(0, sample, n=2))
    totals.count(completion(1, n=2, error="bad"))
    assert totals == Totals(2, 1, 4, 3, 6, {"stop": 2, "error": 2})
    for sample in (1, 0):
        totals.count(Completion.failed(completion(2, n=2).prompt, "cut off", sample, num_tokens=3))
    assert totals == Totals(3, 2, 6, 6, 12, {"stop": 2, "error": 4})


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch, caplog):
    monkeypatch.setattr("batchmix.observability.progress._FIRST_LINE", 0.05)
    stats = EngineStats(prompt_tokens=600, completion_tokens=90, running=7, kv_blocks_used=3, kv_blocks_total=12)
    with caplog.at_level(logging.INFO), Progress(10, 2, stats) as progress:
        for row in range(3):
            progress.count(completion(row))
        time.sleep(0.3)
    line = caplog.records[0].getMessage()
    assert line.startswith("rows 5/10 (50%) | prompt ")
    assert " | batch 7 | KV 25% | ETA 0:00:0" in line
    assert duration(3723.4) == "1:02:03"


def test_metrics_append(tmp_path):
    (tmp_path / ".batchmix").mkdir()
    stats, totals = EngineStats(), Totals()
    path = tmp_path / ".batchmix/metrics.jsonl"
    for run in range(2):
        with Metrics(LocalFolder(tmp_path), stats, totals, shard=run):
            stats.completion_tokens += 10
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["completion_tokens"] for line in lines] == [0, 10, 10, 20]
    assert [line["shard"] for line in lines] == [0, 0, 1, 1]
    assert lines[0]["resident_bytes"] > 1e6


def test_summary_of_two_shards(tmp_path):
    (tmp_path / ".batchmix").mkdir()
    stats, clock = (
        EngineStats(preempted=3, out_of_memory=1, first_prefill_time=100.0, last_token_time=104.0),
        StageClock(),
    )
    clock.add("prefill", 1.0)
    clock.add("decode", 2.0)
    run = RunStatistics(Totals(4, 1, 4, 40, 80, {}), stats, clock, 5.0).as_json()
    assert run["generate_seconds"] == 4.0
    assert (run["preempted"], run["out_of_memory"]) == (3, 1)
    assert run["output_tokens_per_second"] == 20.0
    assert run["device_busy"] == 0.75, "a CPU is busy in its steps"
    on_gpu = RunStatistics(Totals(), stats, clock, 5.0, device_seconds=3.9).as_json()
    assert on_gpu["device_busy"] == 0.975
    summary = Summary(Totals(10, 1, 10, 100, 200, {"stop": 9, "error": 1}), [run, run])
    summary.write(LocalFolder(tmp_path), ".batchmix/summary.json")
    written = json.loads((tmp_path / ".batchmix/summary.json").read_text())
    assert (written["rows"], written["seconds"]["decode"], written["output_tokens_per_second"]) == (10, 4.0, 40.0)
    assert (written["device_busy"], written["out_of_memory"]) == (0.75, 2)
    text = summary.text()
    assert "10 rows, 2 of them from earlier runs (error 1, stop 9)" in text
    assert "generating 4.0 s, 40 output tokens/s, device busy 75.0%" in text
    assert Summary(Totals(), []).text().startswith("0 rows")
    several = Summary(Totals(10, 1, 30, 100, 200, {"stop": 29, "error": 1}), [run, run]).text()
    assert several.startswith("10 rows, 2 of them from earlier runs, 30 samples (error 1, stop 29)")


def test_a_metrics_file_that_cannot_be_written(tmp_path):
    nowhere = LocalFolder(tmp_path / "none")
    with pytest.raises(OSError, match="No such file"), Metrics(nowhere, EngineStats(), Totals(), 0):
        pass
