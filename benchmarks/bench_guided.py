"""What guided decoding costs: decode throughput with and without structured_outputs, in turns, in one run.

    python benchmarks/bench_guided.py [--save] [--rows N] [--tokens N] [--repeats N] [--folder FOLDER]

The random Mixtral of 39 M parameters and the Mixtral tokenizer's vocabulary of 32,000; 256 slots, twice as many short prompts,
64 tokens at temperature 1, on the device that engine.device=auto picks. `records`: an array of small objects, mostly keys,
choices and numbers; `text`: the inside of one long string, also with token_probabilities. Those "on the host" say the same of texts whose length is bounded,
so that they have no table. Only decode steps with a row in nine of ten slots count, so that rows which
end early do not; twice as many rows as slots refill them. What compiling a grammar takes is shown apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import RESULTS, machine, random_prompts, save_tiny_random

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.dtypes import Dtype
from batchmix.engine.build import start_engine
from batchmix.engine.config import EngineConfig
from batchmix.engine.engine import Engine
from batchmix.engine.request import Step
from batchmix.measure.result import save_result
from batchmix.planning.planner import Limits, plan
from batchmix.prompts.tokenizer import load_tokenizer
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.structured_output.host_grammar import HostGrammar

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
TEXT = r'[^"\\\x00-\x1f]'  # what a JSON string has between its quotes
GRAMMARS = {
    "records": StructuredOutputs(json={"type": "array", "items": RECORD, "minItems": 2}),
    "text": StructuredOutputs(regex=f"{TEXT}+"),
    "text, probabilities": StructuredOutputs(regex=f"{TEXT}+", token_probabilities=True),
    "records on the host": StructuredOutputs(json={"type": "array", "items": RECORD, "minItems": 2, "maxItems": 2000}),
    "text on the host": StructuredOutputs(regex=f"{TEXT}{{1,5000}}"),
}


def on_host(name: str) -> bool:
    return name.endswith("on the host")


def decode_rate(engine: Engine, rows: list[Prompt]) -> float:
    """Tokens per second from one decode step to the next, where nine of ten slots have a row and no prompt came between."""
    seconds, tokens = 0.0, 0
    original, scheduler, stats = engine.runner.run, engine.scheduler, engine.stats
    before: tuple[float, int, int] | None = None

    def timed(step: Step) -> None:
        nonlocal seconds, tokens, before
        now = time.perf_counter(), stats.completion_tokens, stats.prompt_tokens
        if before is not None and before[2] == now[2]:
            seconds += now[0] - before[0]
            tokens += now[1] - before[1]
        before = now if len(scheduler.running) >= 0.9 * scheduler.batch.capacity else None
        original(step)

    engine.runner.run = timed  # type: ignore[method-assign]
    limits = Limits(scheduler.batch.capacity, scheduler.pool.num_blocks, scheduler.block_size, 16384)
    for _ in engine.generate(plan(rows, limits)):
        pass
    engine.runner.run = original  # type: ignore[method-assign]
    return tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write <date>-<device>-guided.json into --folder")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gpu = torch.cuda.is_available()
    grammars = {name: outputs for name, outputs in GRAMMARS.items() if find_spec("llguidance") or not on_host(name)}
    if len(grammars) < len(GRAMMARS):
        print("llguidance is not installed: without the grammars on the host")
    free = SamplingConfig(temperature=1.0, max_tokens=args.tokens, ignore_eos=True)
    samplings = {"unguided": free}
    for name, outputs in grammars.items():
        samplings[name] = SamplingConfig(
            temperature=1.0, max_tokens=args.tokens, ignore_eos=True, structured_outputs=outputs
        )
    prompts = random_prompts(2 * args.rows, 16, 64)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_tiny_random(Path(temporary))
        checkpoint = open_checkpoint(ModelConfig(path=str(folder), dtype=Dtype.bfloat16 if gpu else Dtype.float32,
                                                 max_model_len=256))  # fmt: skip
        tokenizer = load_tokenizer(open_checkpoint(ModelConfig()).folder)
        engine = start_engine(checkpoint, tokenizer, EngineConfig(max_num_seqs=args.rows), lambda: False)
    assert engine.grammars is not None
    compile_seconds = {}
    for name in grammars:
        started = time.perf_counter()
        grammar = engine.grammars.get(samplings[name])
        assert isinstance(grammar, HostGrammar) == on_host(name)
        compile_seconds[name] = round(time.perf_counter() - started, 3)
    rates: dict[str, list[float]] = {name: [] for name in samplings}
    forced = {}
    for _ in range(args.repeats):  # in turns, since other users of a machine come and go
        for name, sampling in samplings.items():
            rows = [Prompt(row, str(row), {}, ids, sampling) for row, ids in enumerate(prompts)]
            before = engine.stats.jump_forward_tokens, engine.stats.completion_tokens
            rates[name].append(decode_rate(engine, rows))
            tokens = engine.stats.completion_tokens - before[1]
            forced[name] = (engine.stats.jump_forward_tokens - before[0]) / tokens
    best = {name: max(runs) for name, runs in rates.items()}
    # Of the turns, each beside its own unguided run: the best of many runs differ by more than what is measured.
    costs = {name: 1 - median(np.divide(rates[name], rates["unguided"])) for name in grammars}
    for name, rate in best.items():
        cost = costs.get(name, 0.0)
        note = f", {cost:+.1%} cost; {forced[name]:.0%} of the tokens forced; compiled in {compile_seconds.get(name)} s"
        print(f"{name:<20} {rate:8,.0f} tokens/s in steps of {args.rows} rows{'' if name == 'unguided' else note}")
    if args.save:
        device = torch.cuda.get_device_name() if gpu else "cpu"
        path = save_result(args.folder, device, "guided", {
            "machine": machine(), "device": device, "rows": args.rows, "tokens": args.tokens,
            "decode_tokens_per_second": {name: round(rate, 1) for name, rate in best.items()},
            "cost": {name: round(float(cost), 4) for name, cost in costs.items()},
            "forced_share": {name: round(forced[name], 3) for name in grammars},
            "compile_seconds": compile_seconds,
        })  # fmt: skip
        print(f"written: {path.name}")


if __name__ == "__main__":
    main()
