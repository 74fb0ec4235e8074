"""`.batchmix/metrics.jsonl`: the engine's counters over time, a line every few seconds.

An object store knows no appending: there each shard has a file of its own, written anew once a minute.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from batchmix.memory import resident_bytes
from batchmix.observability.engine_stats import EngineStats
from batchmix.observability.totals import Totals
from batchmix.observability.tracking import Trackers
from batchmix.storage import Storage
from batchmix.storage.bookkeeping import METRICS, metrics_name

_EVERY, _EVERY_UPLOAD = 10.0, 60.0  # seconds


class Metrics:
    """Appends to the file from a thread until the end of the block, where a last line is written. Runs that resume append."""

    def __init__(
        self, storage: Storage, stats: EngineStats, totals: Totals, shard: int, trackers: Trackers | None = None
    ) -> None:
        self._storage = storage
        self._name, self._every = (METRICS, _EVERY) if storage.appends else (metrics_name(shard), _EVERY_UPLOAD)
        self._stats = stats
        self._totals = totals
        self._shard = shard
        self._trackers = trackers
        self._last = (time.time(), 0, 0)  # time, prompt tokens, completion tokens
        self._closed = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> Metrics:
        self._append()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._append()

    def _run(self) -> None:
        try:
            while not self._closed.wait(self._every):
                self._append()
        except OSError as error:
            self._error = error

    def _append(self) -> None:
        line = self._line()
        self._storage.append(self._name, json.dumps(line).encode() + b"\n")
        if self._trackers is not None:
            self._trackers.log(line)

    def _line(self) -> dict[str, Any]:
        stats, (then, prompt, completion) = self._stats, self._last
        now = time.time()
        seconds = max(now - then, 1e-3)
        self._last = (now, stats.prompt_tokens, stats.completion_tokens)
        return {
            "time": round(now, 3),
            "shard": self._shard,
            "rows": self._totals.rows,
            "error_rows": self._totals.error_rows,
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "prompt_tokens_per_second": round((stats.prompt_tokens - prompt) / seconds, 1),
            "output_tokens_per_second": round((stats.completion_tokens - completion) / seconds, 1),
            "running": stats.running,
            "waiting": stats.waiting,
            "preempted": stats.preempted,
            "out_of_memory": stats.out_of_memory,
            "kv_blocks_used": stats.kv_blocks_used,
            "kv_blocks_total": stats.kv_blocks_total,
            "resident_bytes": resident_bytes(),
        }
