"""Compile the kernels of a run before it: those of each captured decode step, and of prefill steps of any size.

The steps run on tensors without memory ("meta") and one layer, while launches are recorded. Parallel processes compile
what those need into Triton's cache on disk. Another process does all that while this one loads weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.cache import get_cache_manager

from batchmix.dtypes import Quantization
from batchmix.engine.cuda_graphs import capture_sizes
from batchmix.engine.model_runner import run_largest_step
from batchmix.kernels import tiles
from batchmix.kernels.compile import compile_in_processes, recorded
from batchmix.kernels.gpu import Gpu
from batchmix.models.mixtral import Mixtral
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.models.triton_ops import TritonOperators
from batchmix.models.weights import empty_weights
from batchmix.observability.engine_stats import EngineStats

_DONE = "compiled_ahead"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Steps:
    """What the kernels of a run's steps depend on."""

    config: MixtralConfig  # of this process's slice
    dtype: torch.dtype
    kv_dtype: torch.dtype
    quantization: Quantization | None
    max_num_seqs: int
    prefill_tokens: int  # in one step, at most
    max_model_len: int
    batch_invariant: bool
    share_prefix: bool


def record_steps(steps: Steps) -> None:
    """Launch what the steps launch, inside of `kernels.compile.recorded`. Variants of the sampling kernels for
    penalties, log-probabilities or grammars are compiled when such rows come."""
    config = replace(steps.config, num_hidden_layers=1)
    weights = empty_weights(config, steps.dtype, torch.device("meta"), steps.quantization)
    model = Mixtral(config, weights, TritonOperators(steps.batch_invariant, steps.share_prefix), steps.max_model_len)
    for rows in capture_sizes(steps.max_num_seqs):
        run_largest_step(model, rows, 0, steps.kv_dtype)
    most = steps.prefill_tokens + steps.max_num_seqs
    # Powers of two and what lies midway meet every tile of rules and tables.
    sizes = {most, *(min(most, part << power) for power in range(most.bit_length()) for part in (2, 3))}
    for tokens in sorted(sizes):
        run_largest_step(model, 1, tokens - 1, steps.kv_dtype)


class CompileAhead:
    """A process that records the steps and has their kernels compiled, while weights load; `finish` waits for it."""

    def __init__(self, steps: Steps, gpu: Gpu, processes: int) -> None:
        self._note = get_cache_manager(_fingerprint(steps, gpu))
        self._process = None
        if self._note.get_file(_DONE) is None:
            environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, pickle.dumps((steps, gpu, processes)).hex()],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip

    def finish(self) -> None:
        """Wait, and log a line of what was compiled. What was not is compiled when it is first launched."""
        if self._process is None:
            _log.info("kernels: all of this run's were compiled before")
            return
        printed, errors = self._process.communicate()
        if self._process.returncode:
            lines = errors.decode(errors="replace").strip().splitlines() or [f"exit code {self._process.returncode}"]
            _log.warning("no kernel was compiled before the run: %s", lines[-1])
            return
        found = json.loads(printed.decode().splitlines()[-1])
        for kernel, error in found["failed"]:
            _log.warning("%s was not compiled before the run: %s", kernel, error)
        if not found["failed"]:
            self._note.put("", _DONE, binary=False)
        _log.info(
            "kernels: %d compiled in %.1f s in %d processes before the run, %d were in Triton's cache",
            found["compiled"], found["seconds"], found["processes"], found["cached"],
        )  # fmt: skip


def _fingerprint(steps: Steps, gpu: Gpu) -> str:
    """Of all that decides which kernels there are, and what they are compiled from."""
    folder = Path(tiles.__file__).parent
    sources = [path.read_bytes() for path in sorted([*folder.glob("*.py"), *folder.glob("configs/*.json")])]
    return hashlib.sha256(repr((steps, gpu, triton.__version__, sources)).encode()).hexdigest()


def _main() -> None:
    """The process: steps in, a line of JSON out."""
    steps, gpu, processes = pickle.loads(bytes.fromhex(sys.argv[1]))
    started = time.perf_counter()
    with torch.inference_mode(), recorded(gpu) as jobs:
        record_steps(steps)
    outcomes = compile_in_processes(jobs, processes)
    cached = sum(outcome.cached for outcome in outcomes)
    failed = [(job.kernel, outcome.error) for job, outcome in zip(jobs, outcomes, strict=True) if outcome.error]
    print(json.dumps({
        "compiled": len(jobs) - cached - len(failed), "cached": cached, "failed": failed, "processes": processes,
        "seconds": time.perf_counter() - started,
    }))  # fmt: skip


class CompileClock:
    """Counts what Triton compiles in this process from now on, and how long it takes: a hook of Triton's."""

    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats
        triton.knobs.compilation.listener = self

    def __call__(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            self._stats.kernels_compiled += 1
            self._stats.compile_seconds += times.total / 1e6


if __name__ == "__main__":
    _main()
