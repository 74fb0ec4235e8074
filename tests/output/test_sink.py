"""The sink by itself: when it commits."""

from __future__ import annotations

import math
import shutil
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from batchmix.observability.clock import StageClock
from batchmix.output.columns import OutputColumns
from batchmix.output.config import OutputFormat
from batchmix.output.part_formats import part_format
from batchmix.output.parts import PartLog, Parts
from batchmix.output.sink import Sink
from batchmix.prompts.buffers import Buffers
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig
from batchmix.storage import LocalFolder
from batchmix.storage.bookkeeping import CHECKSUMS


def sink_into(
    folder: Path, rows_per_shard: int, flush_seconds: float = math.inf, buffers: Buffers | None = None
) -> tuple[Parts, Sink]:
    columns = OutputColumns(pa.schema([]), token_ids=False, logprobs=False)
    storage = LocalFolder(folder)
    storage.make_folder(CHECKSUMS)
    parts = Parts(storage, part_format(OutputFormat.arrow, columns, None, None))
    options = {
        "rows_per_shard": rows_per_shard,
        "flush_seconds": flush_seconds,
        "clock": StageClock(),
        "buffers": buffers,
    }
    return parts, Sink(PartLog(parts, "", 0, 0, lambda: None), tokenizer=None, **options)  # type: ignore[arg-type]


def failed(row: int) -> Completion:
    return Completion.failed(Prompt(row, str(row), {}, [], SamplingConfig()), "no")


def test_no_flush_but_by_rows(tmp_path: Path) -> None:
    parts, sink = sink_into(tmp_path, rows_per_shard=2)
    with sink:
        for row in range(3):
            sink.write(failed(row))
            sink._hand_over()
            time.sleep(0.05)  # so that the thread waits for more
    assert [parts.keys(name).row.tolist() for name in parts.names()] == [[0, 1], [2]]


def test_each_sample_may_fail_for_itself(tmp_path: Path) -> None:
    parts, sink = sink_into(tmp_path, rows_per_shard=2)
    prompt = Prompt(0, "0", {}, [5], SamplingConfig(n=3))
    whole = Completion(prompt, 1, [7], "stop", num_tokens=1)
    unable = Prompt(1, "1", {}, [], SamplingConfig(n=3), "no prompt")
    with sink:
        sink.write(Completion.failed(prompt, "cut off", 2, num_tokens=4))
        sink.write(Completion.failed(unable, "no prompt"))
        sink.write(whole)
        sink.write(Completion.failed(prompt, "cut off", 0, num_tokens=4))
    (name,) = parts.names()
    keys = parts.keys(name)
    assert keys.row.tolist() == [1, 1, 1, 0, 0, 0]
    assert keys.sample.tolist() == [0, 1, 2, 0, 1, 2]
    assert keys.finish_reason.to_pylist() == ["error"] * 4 + ["stop", "error"]
    assert keys.completion_tokens.tolist() == [0, 0, 0, 4, 1, 4]
    totals = parts.totals()
    assert (totals.rows, totals.error_rows, totals.samples) == (2, 2, 6)


@pytest.mark.parametrize("rows_per_shard", [1, 10])
def test_a_disk_that_is_full_at_the_first_or_the_last_part(tmp_path: Path, rows_per_shard: int) -> None:
    _, sink = sink_into(tmp_path / "gone", rows_per_shard)
    shutil.rmtree(tmp_path / "gone")
    sink.write(failed(0))
    outcome: list[OSError] = []

    def close() -> None:
        try:
            sink.close()
        except OSError as error:
            outcome.append(error)

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(20)
    assert outcome, "close waits for a thread that waits for more"


def test_a_part_is_committed_once_it_has_its_bytes(tmp_path: Path) -> None:
    buffers = Buffers.of(1 << 20)
    parts, sink = sink_into(tmp_path, rows_per_shard=10_000, buffers=buffers)
    with sink:
        for row in range(50):
            prompt = Prompt(row, str(row), {}, [1], SamplingConfig(), num_bytes=20_000)
            sink.write(Completion(prompt, 0, [5], "stop", num_tokens=1))
    assert len(parts.names()) >= 50 * 20_000 // buffers.pending
    assert len(parts.rows(parts.names())) == 50
