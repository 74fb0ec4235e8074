"""Compile kernels before they are launched, in parallel processes, into Triton's cache on disk.

    with recorded(gpu) as jobs:
        launch_experts(...)                 # launches nothing and compiles nothing; `jobs` has what it would compile
    outcomes = compile_in_processes(jobs)   # the same launch then finds its kernel in the cache

A launcher runs as it is, so a job holds the specialisation of the real launch: types, constexprs, arguments that are
divisible by 16 or equal to 1, warps and stages. Numbers that only reach the grid make no second job. The tensors may be
of any device, "meta" included: their memory is not touched. No process of this module opens the GPU.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from batchmix.kernels.gpu import Gpu, assume_gpu


@dataclass(frozen=True)
class Specialization:
    """One kernel as one launch would compile it. Picklable; equal ones have the same `identity`."""

    kernel: str  # "batchmix.kernels.moe:_experts_kernel"
    target: GPUTarget
    signature: dict[str, Any]  # constants, signature and attributes are as triton.compiler.ASTSource takes them
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]  # num_warps, num_stages and all others that the back end knows

    @property
    def identity(self) -> str:
        return repr((self.kernel, self.target, self.signature, self.constants, self.attributes, self.options))


@dataclass(frozen=True)
class Outcome:
    """What became of one job."""

    error: str | None  # one line; None where the kernel is in the cache now
    cached: bool = False  # it was there before
    shared: int = 0  # bytes of shared memory that a block needs
    seconds: float = 0.0


def target_of(gpu: Gpu) -> GPUTarget:
    """What Triton compiles for on this GPU."""
    if gpu.arch.startswith("sm_"):
        return GPUTarget("cuda", int(gpu.arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", gpu.arch, 32 if int(gpu.arch[3:-2]) >= 10 else 64)


@contextmanager
def recorded(gpu: Gpu) -> Iterator[list[Specialization]]:
    """Inside, this thread's launches only add to the list what they would compile for `gpu`, each kernel once.

    Any other thread that launches meanwhile gets a RuntimeError. RuntimeError under Triton's interpreter.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter compiles nothing")
    jobs: dict[str, Specialization] = {}
    target = target_of(gpu)

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]  # where tuples have become lists
        job = Specialization(
            f"{fn.module}:{fn.name}",
            target,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()},
        )
        jobs.setdefault(job.identity, job)
        return True  # do not compile, nor launch

    found: list[Specialization] = []
    active, hook = driver._active, triton.knobs.runtime.jit_cache_hook
    driver.set_active(_Recorder(target))
    triton.knobs.runtime.jit_cache_hook = record
    try:
        with assume_gpu(gpu):
            yield found
    finally:
        triton.knobs.runtime.jit_cache_hook = hook
        driver._active = active
        found += jobs.values()


class _Recorder:
    """As much of Triton's driver as a launch asks for before it compiles.

    JITFunction keeps the kernels that it has compiled by device. Ours is one where it never compiles any, so that a
    kernel that this process has launched before is recorded like any other.
    """

    def __init__(self, target: GPUTarget) -> None:
        self._target, self._thread = target, threading.get_ident()

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> object:
        if threading.get_ident() != self._thread:
            raise RuntimeError("a kernel is launched while another thread records what to compile")
        return "recorded", self._target

    def get_current_stream(self, device: object) -> int:
        return 0


def compile_in_processes(
    jobs: Sequence[Specialization], processes: int | None = None, limit: float | None = None
) -> list[Outcome]:
    """Compile every job into Triton's cache; an outcome for each, in order. Equal jobs are compiled once.

    `processes`: by default one for each CPU that this process may use. `limit`: seconds after which the processes are
    ended; jobs that are not done have an error then, as has one that takes its process down.
    """
    queue = list({job.identity: job for job in jobs}.values())
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    deadline = None if limit is None else time.monotonic() + limit
    outcomes: dict[str, Outcome] = {}
    workers = [_Worker() for _ in range(min(processes or cpus, len(queue)))]
    queue.reverse()
    try:
        for worker in workers:
            worker.give(queue.pop())
        while busy := {worker.connection: worker for worker in workers if worker.job is not None}:
            ready = wait(list(busy), None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                worker = busy[connection]  # type: ignore[index]
                job, outcome = worker.take()
                outcomes[job.identity] = outcome
                if queue:
                    worker.give(queue.pop())
    finally:
        for worker in workers:
            worker.end()
    late = Outcome(f"not compiled within {limit} s")
    return [outcomes.get(job.identity, late) for job in jobs]


class _Worker:
    """A process that compiles one job at a time; the next job starts it again should the compiler take it down."""

    def __init__(self) -> None:
        self.job: Specialization | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads and, in a run, the GPU
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, job: Specialization) -> None:
        self.job = job
        if not self._process.is_alive():
            self.connection.close()
            self._start()
        with suppress(OSError):  # it ends at its start: `take` says so
            self.connection.send(job)

    def take(self) -> tuple[Specialization, Outcome]:
        """The job and its outcome. Waits for it."""
        assert self.job is not None
        job, self.job = self.job, None
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            outcome = Outcome(f"the compiler ended with exit code {self._process.exitcode}")
        return job, outcome

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection) -> None:
    """A worker's loop. What compilers print about kernels that they refuse is not for the user."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.environ["TRITON_INTERPRET"] = "0"  # read where a kernel is decorated: at its module's import
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_compile(job))


def _compile(job: Specialization) -> Outcome:
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    start = time.perf_counter()
    try:
        module, name = job.kernel.split(":")
        kernel = importlib.import_module(module)
        for part in name.split("."):
            kernel = getattr(kernel, part)
        source = triton.compiler.ASTSource(kernel, job.signature, job.constants, job.attributes)
        compiled = triton.compile(source, target=job.target, options=job.options)
    except Exception as error:  # whatever the compiler does not like about one kernel, the others are compiled
        line = str(error).strip().partition("\n")[0]
        return Outcome(f"{type(error).__name__}: {line}", seconds=time.perf_counter() - start)
    return Outcome(None, all(hits), compiled.metadata.shared, time.perf_counter() - start)
