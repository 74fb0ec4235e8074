"""Runs that are killed, each in a process forked from this one, which has imported and loaded what they need.

    python tests/helpers/killed_runs.py random 3          # ten kills at random moments; 3 is the seed of all that is chosen
    python tests/helpers/killed_runs.py operations redo   # one at each operation on the output folder; also generate, merge, finalize,
                                                          # and old-redo, in a folder of the old layout

Each prints a line of JSON: how many kills there were, and what differed from runs that were never killed.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.dataset as ds
from old_layout import to_old_layout

from batchmix import pipeline, preflight, stages
from batchmix.config import Config
from batchmix.distributed import executor
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError, Interrupted
from batchmix.input.config import DataConfig, ShardConfig
from batchmix.observability.clock import StageClock
from batchmix.observability.engine_stats import EngineStats
from batchmix.output.config import Order, OutputConfig, OutputFormat, Redo
from batchmix.output.stored_run import finalize_folder
from batchmix.records import Batch, Completion
from batchmix.sampling import SamplingConfig
from batchmix.storage import LocalFolder
from batchmix.storage.bookkeeping import SUCCESS
from batchmix.storage.layout import open_output

TICKETS = Path(__file__).parents[2] / "examples" / "support_tickets.jsonl"
KILLED = 137  # the exit code at an operation, as a shell has it of SIGKILL
Rows = dict[tuple[int, int], dict[str, Any]]
Job = Callable[[], object]


def start(job: Job, log: Path) -> int:
    """The process that does it. It exits as `batchmix` does."""
    process = os.fork()
    if process:
        return process
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    try:
        job()
        code = 0
    except Interrupted:
        code = 75
    except BatchmixError as error:
        print(f"batchmix: error: {error}", flush=True)
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 2
    os._exit(code)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def read(out: Path, form: OutputFormat) -> Rows:
    """All columns of all rows; AssertionError where one is there twice."""
    files = sorted(str(path) for path in out.glob(f"part-*.{form.value}"))
    if form is OutputFormat.jsonl:
        rows = [json.loads(line) for name in files for line in Path(name).read_text(encoding="utf-8").splitlines()]
    else:
        rows = ds.dataset(files, format=form.value).to_table().to_pylist()
    found = {(row["row"], row["sample_index"]): row for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


def faults(out: Path, form: OutputFormat, expected: Rows) -> list[str]:
    """What is wrong with a finished folder."""
    names = sorted(path.name for path in out.rglob("*"))
    changes = ("journal", "merge", "redo")
    left = [name for name in names if name.startswith(".part") or name.removeprefix("_").startswith(changes)]
    found = [f"{name} is left" for name in left]
    if not open_output(str(out)).exists(SUCCESS):
        found.append("no SUCCESS")
    try:
        rows = read(out, form)
    except AssertionError as error:
        return [*found, str(error)]
    found += [f"row {key} differs" for key in expected.keys() | rows.keys() if rows.get(key) != expected.get(key)]
    return found


# Kills at random moments, of the built-in model


def random_kills(seed: int, folder: Path, kills: int = 10) -> dict[str, Any]:
    """Workers of which one is signalled in each round, until there were so many kills; then all is finished."""
    chosen = random.Random(seed)
    form = list(OutputFormat)[seed % 3]
    compression = None if form is OutputFormat.jsonl else chosen.choice(["zstd", "lz4", None])
    order = chosen.choice(list(Order))
    parallel = 2 if seed % 6 == 5 else 1
    data = folder / "rows.jsonl"
    lines = TICKETS.read_text(encoding="utf-8").splitlines()[:30]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def job(out: Path, index: int, count: int) -> Job:
        return lambda: pipeline.generate(Config(
            data=DataConfig(path=str(data)),
            sampling=SamplingConfig(max_tokens=8, n=2, seed=seed),
            engine=EngineConfig(device="cpu", max_num_seqs=chosen.choice([4, 8, 16]), data_parallel_size=parallel),
            output=OutputConfig(dir=str(out), format=form, compression=compression, order=order, rows_per_shard=5,
                                flush_seconds=0.05),
            shard=ShardConfig(index, count),
        ))  # fmt: skip

    log, out = folder / "log", folder / "out"
    began = time.monotonic()
    assert wait(start(job(folder / "undisturbed", 0, 1), log)) == 0, log.read_text()
    longest = time.monotonic() - began
    expected = read(folder / "undisturbed", form)
    killed, rounds, wrong = 0, 0, []
    while killed < kills:
        rounds += 1
        assert rounds < 10 * kills, f"only {killed} of {rounds} signals came before the end\n{log.read_text()}"
        count = chosen.randint(1, 3)  # from round to round another
        processes = [start(job(out, index, count), log) for index in range(count)]
        victim, number = chosen.randrange(count), chosen.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        time.sleep(chosen.uniform(0, longest * 0.6))
        os.kill(processes[victim], number)  # not waited for yet, so it is there at least as a zombie
        codes = [wait(process) for process in processes]
        killed += codes[victim] in (75, -number)
        wrong += [f"exit code {code} of {count} workers" for code in codes if code not in (0, 75, -number)]
        if killed == kills or (out / SUCCESS).exists():  # the next kills fall into a run that begins
            if wait(start(job(out, 0, 1), log)) != 0:
                wrong.append("the last run did not end well")
            wrong += faults(out, form, expected)
            if order is Order.input and list(read(out, form)) != sorted(expected):
                wrong.append("rows are not in order")
            shutil.rmtree(out)
    return {"kills": killed, "rounds": rounds, "rows": len(expected), "wrong": wrong,
            "what": f"{form.value}, {compression}, order={order.value}, data_parallel_size={parallel}",
            "log": log.read_text()[-3000:] if wrong else ""}  # fmt: skip


# Kills at every operation, with a stand-in for the engine


class InstantEngine:
    """Has of an engine what the pipeline asks for. Answers backwards, every third row with as many tokens as it may."""

    def __init__(self) -> None:
        self.clock, self.stats = StageClock(), EngineStats()
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=32000), weights=SimpleNamespace(fingerprint="w"))
        self.grammars = None
        self.scheduler = SimpleNamespace(block_size=16, limits=SimpleNamespace(share_prefix=False), pool=SimpleNamespace(num_blocks=1000),
                                         batch=SimpleNamespace(capacity=64, eos_token_ids=np.array([2])))  # fmt: skip

    def should_stop(self) -> bool:
        """No signal is expected."""
        return False

    def read_totals(self) -> None:
        """There is no device."""

    def generate(self, batches: Iterable[Batch]) -> Iterator[Completion]:
        self.stats.first_prefill_time = self.stats.last_token_time = time.time()
        for batch in batches:
            for prompt in sorted(batch.prompts, key=lambda prompt: -prompt.row):
                cut = prompt.row % 3 == 0 and prompt.sampling.max_tokens < 8
                ids = prompt.token_ids[: prompt.sampling.max_tokens if cut else 2]
                yield Completion(prompt, 0, ids, "length" if cut else "stop", num_tokens=len(ids))


class Fuse:
    """Ends the process at its n-th operation on files of a folder: create, write, fsync, rename, link, list, delete.

    Opening a file to read is none: what is there is then what is there before the next operation.
    """

    EVENTS = ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir")

    def __init__(self, out: Path, operations: int) -> None:
        self.out, self.left = str(out), operations
        sys.addaudithook(self._hear)
        fsync, write = os.fsync, LocalFolder._write

        def fsync_counted(descriptor: int) -> None:
            self.burn()
            fsync(descriptor)

        def write_in_halves(storage: LocalFolder, path: Path, content: Callable[[Any], object]) -> None:
            whole = io.BytesIO()
            content(whole)
            data = whole.getvalue()

            def halves(file: Any) -> None:
                file.write(data[: len(data) // 2])
                file.flush()
                self.burn()
                file.write(data[len(data) // 2 :])

            write(storage, path, halves)

        os.fsync = fsync_counted
        LocalFolder._write = write_in_halves  # type: ignore[method-assign]

    def burn(self) -> None:
        self.left -= 1
        if self.left == 0:
            os._exit(KILLED)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in self.EVENTS and not reads and str(arguments[0]).startswith(self.out):
            self.burn()


def operation_kills(scenario: str, folder: Path) -> dict[str, Any]:
    """The job of a scenario, killed at its first operation, at its second, ... until it ends by itself; then run again."""
    data, log = folder / "rows.jsonl", folder / "log"
    data.write_text("\n".join(TICKETS.read_text(encoding="utf-8").splitlines()[:5]) + "\n", encoding="utf-8")
    checkpoint = preflight.open_checkpoint(Config().model)
    tokenizer = stages.load_tokenizer(checkpoint.folder)
    preflight.open_checkpoint, stages.load_tokenizer = lambda _: checkpoint, lambda *_: tokenizer
    executor.start_engine = lambda *_: InstantEngine()  # type: ignore[assignment]

    def config(out: Path, **output: Any) -> Config:
        return Config(
            data=DataConfig(path=str(data)), sampling=SamplingConfig(max_tokens=4), engine=EngineConfig(device="cpu"),
            output=OutputConfig(dir=str(out), rows_per_shard=2, flush_seconds=1000, **output),
        )  # fmt: skip

    old, scenario = scenario.startswith("old-"), scenario.removeprefix("old-")

    def job(out: Path) -> None:
        if scenario == "finalize":
            finalize_folder(config(out, order=Order.input))
        elif scenario == "redo":
            again = config(out, redo=Redo.length)
            pipeline.generate(replace(again, sampling=SamplingConfig(max_tokens=9)))
        else:
            pipeline.generate(config(out, order=Order.completion if scenario == "generate" else Order.input))

    before = folder / "before"
    if scenario == "generate":
        before.mkdir()
    else:
        assert wait(start(lambda: pipeline.generate(config(before)), log)) == 0, log.read_text()
    if scenario == "finalize":
        (before / SUCCESS).unlink()
    if old:
        to_old_layout(before)
    expected_in = folder / "expected"
    shutil.copytree(before, expected_in)
    assert wait(start(lambda: job(expected_in), log)) == 0, log.read_text()
    expected = read(expected_in, OutputFormat.arrow)
    assert (expected != read(before, OutputFormat.arrow)) == (scenario == "redo") or scenario == "generate"

    def killed_at(operation: int) -> tuple[int, list[str]]:
        """The exit code of the job that is killed there, and what is wrong after the same job again."""
        out = folder / f"out-{operation}"
        shutil.copytree(before, out)

        def killed() -> None:
            Fuse(out, operation)
            job(out)

        code = wait(start(killed, log))
        last = wait(start(lambda: job(out), log)) if code == KILLED else code
        found = [f"exit code {last}"] if last else faults(out, OutputFormat.arrow, expected)
        shutil.rmtree(out)
        return code, [f"killed at operation {operation}: {fault}" for fault in found]

    wrong: list[str] = []
    operation, code = 0, KILLED
    while code == KILLED:
        operation += 1
        code, found = killed_at(operation)
        wrong += found
    return {"kills": operation - 1, "wrong": wrong, "log": log.read_text()[-3000:] if wrong else ""}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        kind, which = sys.argv[1:]
        found = (
            random_kills(int(which), Path(temporary)) if kind == "random" else operation_kills(which, Path(temporary))
        )
    print(json.dumps(found))
