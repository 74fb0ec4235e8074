"""The sink by itself: when it commits."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from batchmix.config import OutputFormat, SamplingConfig
from batchmix.data.columns import OutputColumns
from batchmix.data.part_formats import part_format
from batchmix.data.parts import PartLog, Parts
from batchmix.data.sink import Sink
from batchmix.data.storage import LocalFolder
from batchmix.records import Completion, Prompt
from batchmix.report.clock import StageClock


def sink_into(folder: Path, rows_per_shard: int, flush_seconds: float = math.inf) -> tuple[Parts, Sink]:
    columns = OutputColumns(pa.schema([]), token_ids=False, logprobs=False)
    parts = Parts(LocalFolder(folder), part_format(OutputFormat.arrow, columns, None, None))
    options = {"rows_per_shard": rows_per_shard, "flush_seconds": flush_seconds, "clock": StageClock()}
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


@pytest.mark.parametrize("rows_per_shard", [1, 10])
def test_a_disk_that_is_full_at_the_first_or_the_last_part(tmp_path: Path, rows_per_shard: int) -> None:
    _, sink = sink_into(tmp_path / "gone", rows_per_shard)
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
