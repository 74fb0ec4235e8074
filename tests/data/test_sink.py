"""The sink by itself: when it commits."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pyarrow as pa

from batchmix.config import OutputFormat, SamplingConfig
from batchmix.data.columns import OutputColumns
from batchmix.data.parts import Parts, part_format
from batchmix.data.sink import Sink
from batchmix.records import Completion, Prompt
from batchmix.report.clock import StageClock


def test_no_flush_but_by_rows(tmp_path: Path) -> None:
    columns = OutputColumns(pa.schema([]), token_ids=False, logprobs=False)
    parts = Parts(tmp_path, part_format(OutputFormat.arrow, columns, None, None))
    clock = StageClock()
    with Sink(parts, tmp_path, 0, tokenizer=None, rows_per_shard=2, flush_seconds=math.inf, clock=clock) as sink:
        for row in range(3):
            sink.write(Completion.failed(Prompt(row, str(row), {}, [], SamplingConfig()), "no"))
            sink._hand_over()
            time.sleep(0.05)  # so that the thread waits for more
    assert [parts.keys(path).row.tolist() for path in parts.paths()] == [[0, 1], [2]]
