"""Whole runs of Mixtral-8x7B on one H200, simulated: the schedule so far against decode-first steps with a token budget.

    python benchmarks/bench_schedule.py [--floor MS] [--save]

Rows are drawn as `benchmark throughput` draws them, a step takes what batchmix/planning/step_cost.py says, and the host does
what batchmix/engine does: blocks of 64 tokens, captured sizes, rows that end are observed one window later. Captures and
compilation are free. `--floor`: the least that a step with prompt chunks takes, as its launches are not captured.
Exit code 1 where a workload gains less than its bar.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from common import RESULTS

from batchmix.engine.cuda_graphs import capture_sizes, pad_to_capture_size
from batchmix.engine.input_batch import InputBatch, PendingStep
from batchmix.engine.request import PREFILL_CHUNK, EngineLimits
from batchmix.engine.request import Request as EngineRequest
from batchmix.engine.scheduler import Scheduler
from batchmix.measure.result import save_result
from batchmix.measure.workloads import INSTRUCTION, draw_sizes
from batchmix.models.async_copy import AsyncCopy
from batchmix.models.kv_cache import BLOCK_SIZE
from batchmix.observability.engine_stats import EngineStats
from batchmix.planning.cost import footprint
from batchmix.planning.gpus import get_gpu
from batchmix.planning.step_cost import Step, StepCost, measured_cost
from batchmix.planning.table import MIXTRAL_8X7B
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig

MAX_NUM_SEQS = 1024
MAX_NUM_BATCHED_TOKENS = 8192
KV_TOKENS = 302_464  # that a run in bf16 had on an H200 (2026-11-28)
STEPS_PER_READ = 2
# Of the old schedule, tokens from which a prompt step takes longer to compute than its weights to read: 256 for each expert.
FULL_STEP = 256 * MIXTRAL_8X7B.num_local_experts // MIXTRAL_8X7B.num_experts_per_tok
SHARED_SPLIT = 256  # keys; decode attention reads whole ones of them once for all rows that share them
CHAT_TOKENS = 4  # of the chat format, before a prompt and again behind it
COLUMNS = [(name, np.int64) for name in ("prompt", "answer", "computed", "planned", "blocks", "ended")]  # of a sequence
BARS = {  # least old / new seconds
    ("synthesise", 800): 0.99,
    ("synthesise", 5000): 1.08,
    ("extraction", 2000): 1.10,
    ("long", 400): 1.08,
    ("annotate", 800): None,
    ("annotate", 4000): 1.0,
}


class Request(NamedTuple):
    prompt: int  # tokens
    answer: int  # tokens that it will have, and max_tokens


@dataclass(frozen=True)
class Workload:
    """Requests in the planner's order; each begins with the same `shared` tokens, which are computed once."""

    name: str
    requests: list[Request]
    shared: int = 0

    @property
    def output_tokens(self) -> int:
        return sum(request.answer for request in self.requests)


@dataclass(frozen=True)
class ScheduledStep:
    """What a schedule queues: rows that decode, the keys that they attend to, and prompt chunks as (start, length)."""

    decode_rows: int = 0
    context_tokens: int = 0
    chunks: tuple[tuple[int, int], ...] = ()
    first_tokens: int = 0  # prompts that end in this step, or whose logits are computed with it
    padding_rows: int = 0
    output_tokens: int = 0  # that belong to an answer: rows which have ended unobserved get none
    preempted: int = 0  # sequences since the step before


Schedule = Callable[[Workload], Iterator[ScheduledStep]]


@dataclass(frozen=True)
class Run:
    """What a simulated run took."""

    seconds: float
    prefill_seconds: float  # of steps that decode no row
    steps: int
    mixed_steps: int
    rows_per_step: float  # of steps that decode
    output_tokens: int  # those of preempted sequences again
    preempted: int


def simulate(schedule: Schedule, workload: Workload, cost: StepCost, floor: float = 0.0) -> Run:
    """Run `workload` by `schedule`. `floor`: least seconds of a step that has chunks."""
    seconds = prefill = 0.0
    steps = mixed = decode = rows = tokens = preempted = 0
    for step in schedule(workload):
        took = cost.seconds(
            Step(
                decode_rows=step.decode_rows,
                context_tokens=step.context_tokens,
                prefill_tokens=sum(length for _, length in step.chunks),
                prefill_pairs=sum(length * (start + length / 2) for start, length in step.chunks),
                logits_rows=step.decode_rows + step.first_tokens,
                padding_rows=step.padding_rows,
            )
        )
        took = max(took, floor) if step.chunks else took
        seconds += took
        prefill += 0.0 if step.decode_rows else took
        steps += 1
        mixed += bool(step.chunks and step.decode_rows)
        decode += step.decode_rows > 0
        rows += step.decode_rows
        tokens += step.output_tokens
        preempted += step.preempted
    return Run(seconds, prefill, steps, mixed, rows / max(1, decode), tokens, preempted)


def own_keys(shared: int, contexts: np.ndarray) -> int:
    """Keys that rows with these contexts, which begin with `shared` tokens of all, attend to: whole splits of those once."""
    return int(contexts.sum()) - shared // SHARED_SPLIT * SHARED_SPLIT * max(0, len(contexts) - 1)


class OldBatch:
    """What the host of an engine with the old schedule knows: waiting requests, running sequences, free KV blocks.

    `rows` are the running sequences in the order of admission. `planned` counts the tokens of their answers that are
    queued; a row whose answer is whole stays until it is observed.
    """

    def __init__(self, workload: Workload) -> None:
        self.waiting = deque(workload.requests)
        self.rows = np.zeros(0, COLUMNS)
        self.shared, self.shared_blocks = workload.shared, workload.shared // BLOCK_SIZE
        self.shared_computed = not workload.shared
        self.free = KV_TOKENS // BLOCK_SIZE - self.shared_blocks
        self.mean_answer = 0.0
        self.preempted = 0
        self.sizes = capture_sizes(MAX_NUM_SEQS)

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or len(self.rows) > 0

    def own_tokens(self, request: Request) -> int:
        return request.prompt - self.shared_blocks * BLOCK_SIZE

    def room(self) -> Callable[[Request], bool]:
        """Free KV-cache tokens, net of the expected growth of running sequences: whether a request finds its share there."""
        planned, expected = self.rows["planned"], self.mean_answer or 64.0
        limit = np.minimum(np.maximum(expected, 2 * planned), self.rows["answer"])
        growth = float(np.maximum(limit - planned, 0).sum())
        tokens = self.free * BLOCK_SIZE - growth - BLOCK_SIZE * len(self.rows)

        def take(request: Request) -> bool:
            nonlocal tokens
            needed = self.own_tokens(request) + min(expected, request.answer) + BLOCK_SIZE
            if needed > tokens:
                return False
            tokens -= needed
            return True

        return take

    def startable(self, most_tokens: float) -> tuple[int, int]:
        """(requests, prompt tokens) that find slots and blocks now, counted up to `most_tokens`."""
        take, slots, tokens, count = self.room(), MAX_NUM_SEQS - len(self.rows), 0, 0
        for request in self.waiting:
            if count == slots or tokens >= most_tokens or not take(request):
                break
            count += 1
            tokens += self.own_tokens(request)
        return count, tokens

    def admit(self, take: Callable[[Request], bool]) -> bool:
        """Start the first waiting request, if it has a slot and blocks; one that is alone needs no room to grow."""
        if not self.waiting or len(self.rows) == MAX_NUM_SEQS:
            return False
        request = self.waiting[0]
        blocks = request.prompt // BLOCK_SIZE + 1
        if not (take(request) or not len(self.rows)) or blocks - self.shared_blocks > self.free:
            return False
        self.waiting.popleft()
        self.free -= blocks - self.shared_blocks
        computed = self.shared_blocks * BLOCK_SIZE if self.shared_computed else 0
        self.shared_computed = True
        row = np.array([(request.prompt, request.answer, computed, 0, blocks, 0)], COLUMNS)
        self.rows = np.concatenate([self.rows, row])
        return True

    def take_blocks(self, most: int) -> int:
        """The blocks that decoding rows write to in up to so many steps; how many steps, 0 where none is left to decode.

        Where there are too few, rows that have ended make room, then the most recently admitted sequence is preempted.
        """
        while True:
            rows = self.rows
            left = rows["answer"] - rows["planned"]
            steps = min(most, int(left.max(initial=0)))
            last = rows["prompt"] + rows["planned"] - 2 + np.minimum(steps, left)
            missing = np.where(left > 0, np.maximum(last // BLOCK_SIZE + 1 - rows["blocks"], 0), 0)
            if missing.sum() <= self.free:
                rows["blocks"] += missing
                self.free -= int(missing.sum())
                return steps
            if (rows["planned"] >= rows["answer"]).any():
                self._remove(rows["planned"] >= rows["answer"])
                continue
            youngest = rows[-1]
            self.waiting.appendleft(Request(int(youngest["prompt"]), int(youngest["answer"])))
            self.free += int(youngest["blocks"]) - self.shared_blocks
            self.rows = rows[:-1]
            self.preempted += 1

    def step(self) -> ScheduledStep:
        """Queue a token for every row."""
        rows = self.rows
        alive = rows["planned"] < rows["answer"]
        context = own_keys(self.shared, (rows["prompt"] + rows["planned"])[alive])
        rows["planned"] += alive
        padding = pad_to_capture_size(self.sizes, len(rows)) - len(rows)
        preempted, self.preempted = self.preempted, 0
        return ScheduledStep(len(rows), context, (), 0, padding, int(alive.sum()), preempted)

    def observe(self, all_of_it: bool = False) -> None:
        """Take out the rows that had ended before the last window, and with `all_of_it` those that ended in it."""
        if all_of_it:
            self.rows["ended"] = self.rows["planned"] >= self.rows["answer"]
        self._remove(self.rows["ended"] > 0)
        self.rows["ended"] = self.rows["planned"] >= self.rows["answer"]

    def _remove(self, ended: np.ndarray) -> None:
        if not ended.any():
            return
        gone = self.rows[ended]
        self.free += int(gone["blocks"].sum()) - self.shared_blocks * len(gone)
        mean = float(gone["answer"].mean())
        self.mean_answer = 0.9 * self.mean_answer + 0.1 * mean if self.mean_answer else mean
        self.rows = self.rows[~ended]


def old_schedule(workload: Workload) -> Iterator[ScheduledStep]:
    """Prefill what fits once waiting has lost as much as a prefill step would, else decode a window of steps."""
    batch, idle_reads = OldBatch(workload), 0.0
    while batch.busy:
        count, tokens = batch.startable(FULL_STEP)
        if batch.waiting and (not len(batch.rows) or (count and tokens / FULL_STEP + idle_reads >= 1)):
            running, take = len(batch.rows), batch.room()
            while batch.admit(take):
                pass
            if len(batch.rows) > running:
                yield from _prefill(batch, running)
                idle_reads = 0.0
                batch.observe()
                continue
        steps, active = batch.take_blocks(STEPS_PER_READ), len(batch.rows)
        for _ in range(steps):
            yield batch.step()
        idle_reads += steps * count / max(1, count + active)
        batch.observe(all_of_it=not steps)


def _prefill(batch: OldBatch, first: int) -> Iterator[ScheduledStep]:
    """The prompts of rows `first`, ..., packed; their logits with the last step."""
    packs: list[list[tuple[int, int]]] = [[]]
    room = MAX_NUM_BATCHED_TOKENS
    for row in batch.rows[first:]:
        for start in range(int(row["computed"]), int(row["prompt"]), PREFILL_CHUNK):
            length = min(PREFILL_CHUNK, int(row["prompt"]) - start)
            if packs[-1] and length > room:
                packs.append([])
                room = MAX_NUM_BATCHED_TOKENS
            packs[-1].append((start, length))
            room -= length
    for pack in packs[:-1]:
        yield ScheduledStep(chunks=tuple(pack))
    started = len(batch.rows) - first
    batch.rows["computed"][first:] = batch.rows["prompt"][first:]
    batch.rows["planned"][first:] = 1
    yield ScheduledStep(chunks=tuple(packs[-1]), first_tokens=started, output_tokens=started)


def new_schedule(workload: Workload) -> Iterator[ScheduledStep]:
    """The engine's own scheduler, told of what ends one step late."""
    longest = max(request.prompt + request.answer for request in workload.requests)
    limits = EngineLimits(
        MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, longest, KV_TOKENS // BLOCK_SIZE + 1, BLOCK_SIZE, cuts_prompts=True
    )
    make_batch = partial(InputBatch, 1, (), None, AsyncCopy(torch.device("cpu")), None)
    scheduler = Scheduler(make_batch, limits, EngineStats())
    for row, request in enumerate(workload.requests):
        sampling = SamplingConfig(max_tokens=request.answer, ignore_eos=True)
        prompt = Prompt(row, str(row), {}, range(request.prompt), sampling, shared_tokens=workload.shared)
        scheduler.add(EngineRequest(prompt, [0]))
    sizes, preempted, ended = capture_sizes(MAX_NUM_SEQS), 0, list[EngineRequest]()
    while not scheduler.is_idle:
        step, batch = scheduler.schedule([], STEPS_PER_READ), scheduler.batch
        for _ in range(step.num_steps if step is not None else 0):
            alive, starting = batch.left()[: step.num_decode] > 0, len(scheduler.running) - step.num_decode
            context = own_keys(workload.shared, (batch.prompt_tokens + batch.planned)[: len(alive)][alive])
            padding = 0 if step.chunks else pad_to_capture_size(sizes, step.num_decode) - step.num_decode
            yield ScheduledStep(
                step.num_decode, context, tuple((chunk.start, len(chunk.token_ids)) for chunk in step.chunks),
                starting, padding, int(alive.sum()) + starting, scheduler.stats.preempted - preempted,
            )  # fmt: skip
            preempted = scheduler.stats.preempted
            batch.record_planned(1)
        now = [sequence for sequence, left in zip(scheduler.running, batch.left(), strict=True) if left == 0]
        _finish(scheduler, now if step is None else ended)
        ended = [sequence for sequence in now if step is not None]
        batch.pending.clear()
        if ended:
            batch.pending.append(PendingStep(np.zeros(0, np.int64), list, None))


def _finish(scheduler: Scheduler, sequences: list[EngineRequest]) -> None:
    """Take those out that are still there: others have been preempted."""
    gone = set(map(id, sequences))
    slots = [slot for slot, sequence in enumerate(scheduler.running) if id(sequence) in gone]
    if slots:
        scheduler.record_answers(scheduler.running[slot].prompt.sampling.max_tokens for slot in slots)
    for slot in reversed(slots):
        scheduler.finish(slot)


def draw(name: str, rows: int) -> Workload:
    """The rows of `benchmark throughput`, in the order of the planner: windows that grow, each longest prompt first."""
    source, instruction = random.Random(name), INSTRUCTION if name == "annotate" else 0
    sizes = [draw_sizes(name, source) for _ in range(rows)]
    requests = [Request(instruction + own + 2 * CHAT_TOKENS, max(2, answer)) for own, answer in sizes]
    ordered, start, window = [], 0, 256
    while start < rows:
        ordered += sorted(requests[start : start + window], key=lambda request: -request.prompt)
        start, window = start + window, min(4 * window, 16384)
    return Workload(name, ordered, instruction + CHAT_TOKENS if instruction else 0)


def h200_cost() -> StepCost:
    """Of Mixtral-8x7B in bf16, as measured."""
    cost = measured_cost(footprint(MIXTRAL_8X7B, 2), get_gpu("h200"))
    assert cost is not None
    return cost


def compare(name: str, rows: int, cost: StepCost, floor: float = 0.0) -> tuple[Run, Run]:
    """(old, new) runs of so many rows of a workload."""
    workload = draw(name, rows)
    return simulate(old_schedule, workload, cost, floor), simulate(new_schedule, workload, cost, floor)


def _rounded(run: Run) -> dict[str, float]:
    return {name: round(value, 3) for name, value in asdict(run).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--floor", type=float, default=0.0, metavar="MS", help="least ms of a step with chunks; e.g. 45"
    )
    parser.add_argument("--save", action="store_true", help="write <date>-simulated-h200-schedule.json")
    args = parser.parse_args()
    cost = h200_cost()
    print("| workload | rows | old, s | new, s | old / new | bar | rows a step, old | new | mixed steps | preempted |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    missed, found = [], dict[str, Any]()
    for (name, rows), bar in BARS.items():
        old, new = compare(name, rows, cost, args.floor / 1e3)
        ratio = old.seconds / new.seconds
        print(
            f"| {name} | {rows:,} | {old.seconds:.1f} | {new.seconds:.1f} | {ratio:.3f} | {bar or ''} |"
            f" {old.rows_per_step:.0f} | {new.rows_per_step:.0f} | {new.mixed_steps:,} of {new.steps:,} |"
            f" {new.preempted:,} |",
            flush=True,
        )
        found[f"{name} {rows}"] = {"old": _rounded(old), "new": _rounded(new), "ratio": round(ratio, 4), "bar": bar}
        if bar is not None and ratio < bar:
            missed.append(f"{name} {rows:,}: {ratio:.3f}, not {bar}")
    if args.save:
        result = {
            "shape": "8x7b",
            "dtype": "bfloat16",
            "kv_tokens": KV_TOKENS,
            "floor_ms": args.floor,
            "workloads": found,
        }
        path = save_result(RESULTS, "simulated-h200", "schedule", result)
        print(f"written: benchmarks/results/{path.name}")
    if missed:
        sys.exit("below the bar: " + "; ".join(missed))


if __name__ == "__main__":
    main()
