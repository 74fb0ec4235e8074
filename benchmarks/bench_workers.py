"""What sharing one output folder costs: many workers over one data set, with a stand-in for the engine.

    python benchmarks/bench_workers.py [--workers 8] [--rows 1000000] [--ideal 300] [--save]
    python benchmarks/bench_workers.py --driver [--rows 100000] [--save]     # what one driver commits for its workers

Each worker is `batchmix generate` in a process of its own, with all its stages, leases, commits, and the last one's
check and `.batchmix/SUCCESS`; only the engine is replaced, by one that sleeps as long as a device would work: a batch of n rows
takes n / (rows per second). The ideal split is rows / (workers x rows per second), with nothing but devices at work; the
time is taken from the start of the first process to the end of the last, with Python's own start. What a worker's thread
does between two batches (planning, handing over completions) stands in the way of the next, as it would of an engine's.
On a machine with fewer cores than workers all their host work shares the cores, which a cluster's does not.

`--driver` runs one process with `engine.data_parallel_size=8` whose workers are replaced by stand-ins in the process itself,
which answer at once with DRIVER_TOKENS tokens a row. It counts the process's CPU seconds, all threads together, less those that
the stand-ins took: reading, handing out and receiving (pickled, as through a pipe), detokenising and committing are the driver's.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import save

from batchmix import pipeline
from batchmix.config import Config
from batchmix.distributed import executor
from batchmix.distributed.engine_worker import Report
from batchmix.distributed.worker_pool import PoolWorker, WorkerPool
from batchmix.engine.config import EngineConfig
from batchmix.input.config import DataConfig, ShardConfig
from batchmix.observability.clock import StageClock
from batchmix.observability.engine_stats import EngineStats
from batchmix.output.config import OutputConfig
from batchmix.records import Batch, Completion, InputRow, Prompt
from batchmix.sampling import SamplingConfig

EXAMPLES = Path(__file__).parent.parent / "examples" / "support_tickets.jsonl"
ANSWER_TOKENS = 16
DRIVER_TOKENS = 128
ANSWER = array("i", [*range(1000, 1000 + DRIVER_TOKENS)])
PROMPT = array("i", [*range(1000, 1000 + 180)])  # 340 : 240 of what eight GPUs prefill and decode
SAMPLING = SamplingConfig(max_tokens=DRIVER_TOKENS)
ROWS_AT_ONCE = 1024


class SleepingEngine:
    """Has of an engine what the pipeline asks for."""

    def __init__(self, rows_per_second: float) -> None:
        self._rows_per_second = rows_per_second
        self.clock, self.stats = StageClock(), EngineStats()
        self.model = SimpleNamespace(
            config=SimpleNamespace(vocab_size=32000), weights=SimpleNamespace(fingerprint="none")
        )
        self.grammars = None
        self.scheduler = SimpleNamespace(
            max_model_len=4096,
            block_size=64,
            limits=SimpleNamespace(share_prefix=False),
            pool=SimpleNamespace(num_blocks=100_000),
            batch=SimpleNamespace(capacity=ROWS_AT_ONCE, eos_token_ids=torch.tensor([2])),
        )

    def should_stop(self) -> bool:
        """No signal is expected."""
        return False

    def read_totals(self) -> None:
        """There is no device."""

    def generate(self, batches: Iterable[Batch]) -> Iterator[Completion]:
        """Answers with the first tokens of the prompt."""
        self.stats.first_prefill_time = time.time()
        for batch in batches:
            time.sleep(len(batch.prompts) / self._rows_per_second)
            self.stats.last_token_time = time.time()
            for prompt in batch.prompts:
                ids = prompt.token_ids[:ANSWER_TOKENS]
                yield Completion(prompt, 0, ids, "length", num_tokens=len(ids))


class InstantPool(WorkerPool):
    """Workers that answer at once, in this process. `seconds` is the CPU time of what theirs would be."""

    seconds = 0.0

    @property
    def _max_workers(self) -> int:
        return self._config.engine.data_parallel_size

    def _grow(self) -> None:
        while not self._all or len(self._all) < self._max_workers:
            worker = PoolWorker(handle=[], loaded=True)
            self._workers.append(worker)
            self._all.append(worker)

    def _send(self, worker: PoolWorker, rows: list[InputRow]) -> None:
        unit = pickle.dumps(rows)
        began = time.process_time()
        for start in range(0, len(rows), 256):
            prompts = [Prompt(row.row, row.id, {}, PROMPT, SAMPLING) for row in pickle.loads(unit)[start : start + 256]]
            answers = [Completion(prompt, 0, ANSWER, "length", num_tokens=len(ANSWER)) for prompt in prompts]
            worker.handle.append(pickle.dumps((answers, Report())))
        InstantPool.seconds += time.process_time() - began

    def _listen(self) -> Iterator[tuple[PoolWorker, Any]]:
        for worker in list(self._workers):
            while worker.handle:
                yield worker, pickle.loads(worker.handle.pop())

    def _kill(self, worker: PoolWorker) -> None:
        """There is no process."""


def drive(rows: int, keep: bool) -> None:
    """Print, and with `keep` save, the output tokens that one driver commits in a second of one core."""
    pipeline.ProcessPool = InstantPool  # type: ignore[misc,assignment]
    with tempfile.TemporaryDirectory() as temporary:
        data, out = Path(temporary, "rows.jsonl"), Path(temporary, "out")
        write_rows(data, rows)
        engine = EngineConfig(device="cpu", data_parallel_size=8)
        config = Config(
            data=DataConfig(path=str(data)), sampling=SAMPLING, engine=engine, output=OutputConfig(dir=str(out))
        )
        began, wall = time.process_time(), time.perf_counter()
        pipeline.generate(config)
        cpu, wall = time.process_time() - began - InstantPool.seconds, time.perf_counter() - wall
        assert (out / ".batchmix/SUCCESS").exists()
    tokens, prompt_tokens = rows * len(ANSWER), rows * len(PROMPT)
    print(f"{rows:,} rows of {len(PROMPT)} + {len(ANSWER)} tokens: the driver took {cpu:.1f} CPU seconds, {tokens / cpu:,.0f} output"
          f" tokens and {(tokens + prompt_tokens) / cpu:,.0f} tokens in all for each ({wall:.1f} s, load {os.getloadavg()[0]:.1f})")  # fmt: skip
    if keep:
        save("driver", {"rows": rows, "prompt_tokens": prompt_tokens, "output_tokens": tokens, "driver_cpu_seconds": round(cpu, 2),
                        "output_tokens_per_cpu_second": round(tokens / cpu), "load_average": round(os.getloadavg()[0], 1)})  # fmt: skip


def write_rows(path: Path, count: int) -> None:
    lines = EXAMPLES.read_text(encoding="utf-8").splitlines()
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            file.write(lines[row % len(lines)] + "\n")


def work(data: str, out: str, index: int, count: int, rows_per_second: float) -> None:
    """One worker."""
    executor.start_engine = lambda *_: SleepingEngine(rows_per_second)  # type: ignore[attr-defined,assignment]
    pipeline.generate(
        Config(
            data=DataConfig(path=data),
            sampling=SamplingConfig(max_tokens=ANSWER_TOKENS),
            engine=EngineConfig(device="cpu"),
            output=OutputConfig(dir=out),
            shard=ShardConfig(index, count),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--ideal", type=float, default=300.0, help="seconds that the ideal split takes")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-cpu-workers.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)  # data, out, index, rows per second
    parser.add_argument("--driver", action="store_true", help="measure the driver of eight workers alone")
    args = parser.parse_args()
    if args.driver:
        drive(args.rows, args.save)
        return
    if args.worker:
        data, out, index, rate = args.worker
        work(data, out, int(index), args.workers, float(rate))
        return
    rate = args.rows / args.workers / args.ideal
    with tempfile.TemporaryDirectory() as temporary:
        data, out = str(Path(temporary, "rows.jsonl")), str(Path(temporary, "out"))
        write_rows(Path(data), args.rows)
        command = [sys.executable, __file__, "--workers", str(args.workers), "--worker", data, out]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        load, started = os.getloadavg()[0], time.perf_counter()
        workers = [
            subprocess.Popen([*command, str(index), str(rate)], env=environment, stdout=subprocess.DEVNULL)
            for index in range(args.workers)
        ]
        assert [worker.wait() for worker in workers] == [0] * args.workers
        seconds = time.perf_counter() - started
        assert Path(out, ".batchmix/SUCCESS").exists()
        summary: dict[str, Any] = json.loads(Path(out, ".batchmix/summary.json").read_text())
        assert (summary["rows"], summary["error_rows"]) == (args.rows, 0), summary
    ratio = seconds / args.ideal
    generating = summary["generate_seconds"] / args.ideal
    print(f"{args.rows:,} rows, {args.workers} workers of {rate:,.0f} rows/s on {os.cpu_count()} cores: {seconds:.1f} s,"
          f" {ratio:.3f} x the ideal split of {args.ideal:.0f} s; from the first row to the last {generating:.3f} x"
          f" (load average before: {load:.1f})")  # fmt: skip
    if args.save:
        save("workers", {"rows": args.rows, "workers": args.workers, "rows_per_second_each": round(rate, 1),
                         "ideal_seconds": args.ideal, "seconds": round(seconds, 1), "ratio": round(ratio, 3),
                         "ratio_first_to_last_row": round(generating, 3), "load_average_before": round(load, 1)})  # fmt: skip


if __name__ == "__main__":
    main()
