"""Progress over rows: a bar where a person looks at a terminal, a line now and then where it goes to a log file."""

from __future__ import annotations

import logging
import sys
import threading
import time

from tqdm.auto import tqdm

from batchmix.observability.engine_stats import EngineStats
from batchmix.observability.totals import Totals
from batchmix.records import Completion

_log = logging.getLogger(__name__)
_FIRST_LINE, _LINE_EVERY, _BAR_EVERY = 5.0, 30.0, 0.5  # seconds


class Progress:
    """Shows how far the run is, from a thread, so that it also does during a long prefill. A context manager.

    `total`: rows of this shard, done ones included; None where nobody knows (it can be set later). `done`: rows of
    earlier runs.
    """

    def __init__(self, total: int | None, done: int, stats: EngineStats) -> None:
        self.total = total
        self.totals = Totals()
        self._done = done
        self._stats = stats
        self._started = time.monotonic()
        watched = sys.stderr.isatty() or "ipykernel" in sys.modules  # a terminal, or a notebook
        self._bar = tqdm(total=total, initial=done, unit=" rows", dynamic_ncols=True) if watched else None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def count(self, completion: Completion) -> None:
        """One more sample came out of the engine."""
        self.totals.count(completion)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._bar is not None:
            self._show_bar(self._bar)
            self._bar.close()

    def _run(self) -> None:
        wait = _FIRST_LINE if self._bar is None else _BAR_EVERY
        while not self._closed.wait(wait):
            if self._bar is not None:
                self._show_bar(self._bar)
            else:
                _log.info("%s", self.line())
                wait = _LINE_EVERY

    def _show_bar(self, bar: tqdm[None]) -> None:
        bar.total = self.total
        bar.set_postfix_str(", ".join(self._rates()), refresh=False)
        bar.update(self._done + self.totals.rows - bar.n)

    def line(self) -> str:
        """`rows 1,200/10,000 (12 %) | prompt 3,400 tok/s | output 900 tok/s | batch 64 | KV 43 % | ETA 0:12:30`"""
        rows = self._done + self.totals.rows
        if self.total:
            parts = [f"rows {rows:,}/{self.total:,} ({rows / self.total:.0%})", *self._rates()]
        else:
            parts = [f"rows {rows:,}", *self._rates()]
        if self.total and self.totals.rows:
            left = (self.total - rows) * (time.monotonic() - self._started) / self.totals.rows
            parts.append(f"ETA {duration(left)}")
        return " | ".join(parts)

    def _rates(self) -> list[str]:
        stats, seconds = self._stats, max(time.monotonic() - self._started, 1e-3)
        return [
            f"prompt {stats.prompt_tokens / seconds:,.0f} tok/s",
            f"output {stats.completion_tokens / seconds:,.0f} tok/s",
            f"batch {stats.running}",
            f"KV {stats.kv_blocks_used / max(1, stats.kv_blocks_total):.0%}",
        ]


def duration(seconds: float) -> str:
    """`1:02:03`"""
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{whole:02}"
