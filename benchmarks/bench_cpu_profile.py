"""Where an engine's CPU time goes, by operator, on the work of bench_engine.py, for each of the CPU's backends.

    python benchmarks/bench_cpu_profile.py [--save] [--backends torch numba]

Seconds of CPU time in one thread, so other users of a machine show less in them; medians of three turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_engine import NEW_TOKENS, Generate, open_batchmix
from common import random_prompts, save, save_tiny_random

from batchmix.models import torch_products
from batchmix.models.mixtral import Mixtral
from batchmix.models.torch_attention import PrefillAttention

PARTS = {  # of a run's time; what is within another part counts there alone
    "products": (torch_products, "one_call"),
    "attention of prompts": (PrefillAttention, "__call__"),
}
OPERATORS = {"experts without products": "moe", "norms": "rms_norm add_rms_norm", "choice": "sample post_update"}


class Clock:
    """CPU time by part, what a part calls of other parts left out."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.process_time()
            self._inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                taken = time.process_time() - started
                self.seconds[part] += taken - self._inner.pop()
                self._inner[-1] += taken

        return run


class TimedOperators:
    """A backend's operators, by a clock."""

    def __init__(self, ops: Any, clock: Clock) -> None:
        self._ops, self._clock = ops, clock
        for part, names in OPERATORS.items():
            for name in names.split():
                setattr(self, name, clock.timed(part, getattr(ops, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def attend(self, *arguments: Any) -> Any:
        part = "attention of generated tokens, rotary, cache"
        return self._clock.timed(part, self._clock.timed(part, self._ops.attend)(*arguments))


def profile(folder: Path, backend: str, clock: Clock) -> Generate:
    """An engine whose operators tell the clock."""
    original = Mixtral.__init__

    def init(self: Mixtral, config: Any, weights: Any, operators: Any, *arguments: Any, **options: Any) -> None:
        original(self, config, weights, TimedOperators(operators, clock), *arguments, **options)

    Mixtral.__init__ = init  # type: ignore[method-assign]
    try:
        return open_batchmix(folder, "float32", backend)
    finally:
        Mixtral.__init__ = original  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-cpu-profile.json")
    parser.add_argument("--backends", nargs="+", default=["torch", "numba"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts, clock = random_prompts(256), Clock()
    for part, (owner, name) in PARTS.items():
        setattr(owner, name, clock.timed(part, getattr(owner, name)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_tiny_random(Path(temporary))
        engines = {backend: profile(folder, backend, clock) for backend in args.backends}
        turns: dict[str, list[dict[str, float]]] = {backend: [] for backend in engines}
        for generate in engines.values():
            generate(prompts[:4], 4)
        for _ in range(args.repeats):
            for backend, generate in engines.items():
                clock.seconds.clear()
                clock.timed("the rest", generate)(prompts, NEW_TOKENS)
                turns[backend].append(dict(clock.seconds))
    seconds = {
        backend: {part: round(statistics.median(turn[part] for turn in found), 2) for part in found[0]}
        for backend, found in turns.items()
    }
    for part in next(iter(seconds.values())):
        print(f"{part:<46}" + "".join(f"{backend} {found[part]:6.2f} s   " for backend, found in seconds.items()))
    totals = {
        backend: round(statistics.median(sum(turn.values()) for turn in found), 2) for backend, found in turns.items()
    }
    print(f"{'run':<46}" + "".join(f"{backend} {total:6.2f} s   " for backend, total in totals.items()))
    if args.save:
        save("profile", {"cpu_seconds": seconds, "run": totals, "dtype": "float32"})


if __name__ == "__main__":
    main()
