"""What guided decoding costs: decode throughput with and without structured_outputs, in turns, in one run.

    python benchmarks/bench_guided.py [--save] [--rows N] [--tokens N] [--repeats N]

The random Mixtral of 39 M parameters and the Mixtral tokenizer's vocabulary of 32,000; 256 rows of one short prompt each,
64 tokens at temperature 1, none of which ends a row, on the device that engine.device=auto picks. `records`: an array of
small objects, mostly keys, choices and numbers; `text`: one long string. Only decode steps count: the median step, and
how many there were. Where compiling a guide costs time, it is shown apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import random_prompts, save, save_tiny_random

from batchmix.config import Dtype, EngineConfig, ModelConfig, SamplingConfig, StructuredOutputs
from batchmix.data.tokenizer import load_tokenizer
from batchmix.engine.engine import Engine
from batchmix.engine.start import start_engine
from batchmix.model.checkpoint import open_checkpoint
from batchmix.plan.planner import Limits, plan
from batchmix.records import Prompt

RECORD = {
    "type": "object",
    "properties": {
        "sentiment": {"enum": ["positive", "negative", "neutral"]},
        "topic": {"enum": ["billing", "shipping", "login", "bug"]},
        "urgent": {"type": "boolean"},
        "score": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["sentiment", "topic", "urgent", "score"],
}
SCHEMAS: dict[str, Any] = {
    "records": {"type": "array", "items": RECORD},
    "text": {"type": "object", "properties": {"summary": {"type": "string"}}, "required": ["summary"]},
}


def timed_steps(engine: Engine, rows: list[Prompt]) -> np.ndarray:
    """Seconds of each decode step of a run."""
    seconds: list[float] = []
    decode, state = engine.decode.run, engine.state

    def timed() -> None:
        started = time.perf_counter()
        decode()
        seconds.append(time.perf_counter() - started)

    engine.decode.run = timed  # type: ignore[method-assign]
    limits = Limits(state.slots.capacity, state.pool.num_blocks, state.cache.block_size, 16384)
    for _ in engine.generate(plan(rows, limits)):
        pass
    engine.decode.run = decode  # type: ignore[method-assign]
    return np.array(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-cpu-guided.json")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    free = SamplingConfig(temperature=1.0, max_tokens=args.tokens, ignore_eos=True)
    samplings = {"unguided": free}
    for name, schema in SCHEMAS.items():
        # `ignore_eos` keeps rows from ending early, so each run has the same steps of the same rows.
        outputs = StructuredOutputs(json=schema)
        samplings[name] = SamplingConfig(
            temperature=1.0, max_tokens=args.tokens, ignore_eos=True, structured_outputs=outputs
        )
    prompts = random_prompts(args.rows, 16, 64)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_tiny_random(Path(temporary))
        checkpoint = open_checkpoint(ModelConfig(path=str(folder), dtype=Dtype.float32, max_model_len=256))
        tokenizer = load_tokenizer(open_checkpoint(ModelConfig()).folder)
        engine = start_engine(checkpoint, tokenizer, EngineConfig(max_num_seqs=args.rows), lambda: False)
    assert engine.guides is not None
    compile_seconds = {}
    for name in SCHEMAS:
        started = time.perf_counter()
        engine.guides.get(samplings[name])
        compile_seconds[name] = round(time.perf_counter() - started, 3)
    steps: dict[str, list[np.ndarray]] = {name: [] for name in samplings}
    for _ in range(args.repeats):  # in turns, since other users of a machine come and go
        for name, sampling in samplings.items():
            rows = [Prompt(row, str(row), {}, ids, sampling) for row, ids in enumerate(prompts)]
            steps[name].append(timed_steps(engine, rows))
    median = {name: min(float(np.median(run)) for run in runs) * 1e3 for name, runs in steps.items()}
    for name, milliseconds in median.items():
        cost = milliseconds / median["unguided"] - 1
        print(f"{name:<10} {milliseconds:7.2f} ms a step of {args.rows} rows ({args.rows / milliseconds * 1e3:,.0f} tokens/s)"
              f"{'' if name == 'unguided' else f', {cost:+.1%}; compiled in {compile_seconds[name]:.3f} s'}")  # fmt: skip
    if args.save:
        save("guided", {"rows": args.rows, "tokens": args.tokens, "device": str(engine.state.cache.keys.device),
                        "median_step_ms": {name: round(value, 3) for name, value in median.items()},
                        "cost": {name: round(median[name] / median["unguided"] - 1, 4) for name in SCHEMAS},
                        "compile_seconds": compile_seconds})  # fmt: skip


if __name__ == "__main__":
    main()
