"""Clock, progress, metrics and summary."""

from __future__ import annotations

import json
import logging
import threading
import time

import pytest

from batchmix.config import SamplingConfig
from batchmix.engine.stats import EngineStats
from batchmix.records import Completion, Prompt
from batchmix.report.clock import StageClock
from batchmix.report.metrics import Metrics
from batchmix.report.progress import Progress, duration
from batchmix.report.summary import RunStatistics, Summary
from batchmix.report.totals import Totals


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


def completion(row: int, sample: int = 0, n: int = 1, error: str | None = None) -> Completion:
    prompt = Prompt(row, str(row), {}, [] if error else [1, 2, 3], SamplingConfig(n=n), error)
    return Completion.failed(prompt, error) if error else Completion(prompt, sample, [4, 5], "stop", num_tokens=3)


def test_totals_count_prompts_once_and_samples_each():
    totals = Totals()
    for sample in (1, 0):
        totals.count(completion(0, sample, n=2))
    totals.count(completion(1, n=2, error="bad"))
    assert totals == Totals(2, 1, 4, 3, 6, {"stop": 2, "error": 2})


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch, caplog):
    monkeypatch.setattr("batchmix.report.progress._FIRST_LINE", 0.05)
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
    stats, totals = EngineStats(), Totals()
    path = tmp_path / "_metrics.jsonl"
    for run in range(2):
        with Metrics(path, stats, totals, shard=run):
            stats.completion_tokens += 10
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["completion_tokens"] for line in lines] == [0, 10, 10, 20]
    assert [line["shard"] for line in lines] == [0, 0, 1, 1]
    assert lines[0]["resident_bytes"] > 1e6


def test_summary_of_two_shards(tmp_path):
    stats = EngineStats(prefill_seconds=1.0, decode_seconds=2.0, first_prefill_time=100.0, last_token_time=104.0)
    run = RunStatistics(Totals(4, 1, 4, 40, 80, {}), stats, StageClock(), 5.0).as_json()
    assert run["generate_seconds"] == 4.0
    assert run["output_tokens_per_second"] == 20.0
    summary = Summary(Totals(10, 1, 10, 100, 200, {"stop": 9, "error": 1}), [run, run])
    summary.write(tmp_path / "_summary.json")
    written = json.loads((tmp_path / "_summary.json").read_text())
    assert (written["rows"], written["seconds"]["decode"], written["output_tokens_per_second"]) == (10, 4.0, 40.0)
    text = summary.text()
    assert "10 rows, 2 of them from earlier runs (error 1, stop 9)" in text
    assert "generating 4.0 s, 40 output tokens/s" in text
    assert Summary(Totals(), []).text().startswith("0 rows")


def test_a_metrics_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="No such file"), Metrics(tmp_path / "none" / "m", EngineStats(), Totals(), 0):
        pass
