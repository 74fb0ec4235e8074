"""The engine beside transformers.generate (and vLLM, where it is installed) on the same work, in one run.

    python benchmarks/bench_engine.py [--save] [--vllm-python PATH]

A random Mixtral of 39 M parameters, 256 prompts of 16 to 512 tokens, 64 greedy tokens each, end of sequence ignored,
float32, 2 threads; medians of five turns. transformers gets length-sorted batches of 32 and its eager experts, its fastest setting on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import random_prompts, save, save_tiny_random

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.dtypes import Dtype
from batchmix.engine.build import start_engine
from batchmix.engine.config import Backend, EngineConfig
from batchmix.planning.planner import Limits, plan
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig

NEW_TOKENS = 64
OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how the threads of all three wait for one another
_VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, file, new, dtype = sys.argv[1:]
prompts = [{"prompt_token_ids": ids} for ids in json.load(open(file))]
llm = LLM(folder, dtype=dtype, skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=256,
          max_num_batched_tokens=4096, enable_prefix_caching=False, disable_log_stats=True)
params = SamplingParams(temperature=0, max_tokens=int(new), ignore_eos=True, detokenize=False)
llm.generate(prompts[:4], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False))
print("RESULT null", flush=True)
for _ in sys.stdin:
    started, cpu = time.perf_counter(), time.process_time()
    out = llm.generate(prompts, params, use_tqdm=False)
    seconds = [time.perf_counter() - started, time.process_time() - cpu]
    print("RESULT " + json.dumps({"seconds": seconds, "ids": [list(o.outputs[0].token_ids) for o in out]}), flush=True)
"""

Generate = Callable[[list[list[int]], int], list[list[int]]]  # prompts and number of new tokens -> new tokens


def open_batchmix(folder: Path, dtype: str, backend: str = "auto") -> Generate:
    """Ours: planned batches through the engine."""
    checkpoint = open_checkpoint(ModelConfig(path=str(folder), dtype=Dtype[dtype], max_model_len=1024))
    engine = start_engine(checkpoint, None, EngineConfig(max_num_seqs=256, backend=Backend[backend]), lambda: False)
    limits = Limits(
        engine.scheduler.batch.capacity, engine.scheduler.pool.num_blocks, engine.scheduler.block_size, 16384
    )

    def run(ids: list[list[int]], new: int) -> list[list[int]]:
        sampling = SamplingConfig(temperature=0.0, max_tokens=new, ignore_eos=True)
        rows = [Prompt(row, str(row), {}, tokens, sampling) for row, tokens in enumerate(ids)]
        found = sorted(engine.generate(plan(rows, limits)), key=lambda completion: completion.prompt.row)
        return [list(completion.token_ids) for completion in found]

    return run


def open_transformers(folder: Path, dtype: str) -> Generate:
    """transformers.generate."""
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), experts_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None

    def run(ids: list[list[int]], new: int) -> list[list[int]]:
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        out: list[list[int]] = [[] for _ in ids]
        for low in range(0, len(order), 32):
            chosen = order[low : low + 32]
            longest = max(len(ids[i]) for i in chosen)
            tokens = torch.zeros(len(chosen), longest, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for place, i in enumerate(chosen):
                tokens[place, longest - len(ids[i]) :] = torch.tensor(ids[i])
                mask[place, longest - len(ids[i]) :] = 1
            answer = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
            for place, i in enumerate(chosen):
                out[i] = answer[place, longest:].tolist()
        return out

    return run


Turn = Callable[[], tuple[list[float], list[list[int]]]]  # -> seconds, seconds of CPU time; new tokens


def turn_of(generate: Generate, prompts: list[list[int]]) -> Turn:
    """A turn of an engine of this process."""
    generate(prompts[:4], 4)

    def turn() -> tuple[list[float], list[list[int]]]:
        started, cpu = time.perf_counter(), time.process_time()
        ids = generate(prompts, NEW_TOKENS)
        return [time.perf_counter() - started, time.process_time() - cpu], ids

    return turn


def open_vllm(python: str, folder: Path, prompts: list[list[int]], dtype: str) -> Turn:
    """vLLM in its own environment and process, which waits for its turns."""
    file, log = folder / "prompts.json", folder / "vllm.log"
    file.write_text(json.dumps(prompts))
    command = [python, "-c", _VLLM, str(folder), str(file), str(NEW_TOKENS), dtype]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
                "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}  # fmt: skip
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env=os.environ | settings,
    )  # ends with its standard input
    assert process.stdin is not None
    assert process.stdout is not None
    requests, lines = process.stdin, process.stdout

    def answer() -> Any:
        for line in lines:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise SystemExit(f"vLLM failed:\n{log.read_text()[-3000:]}")

    def turn() -> tuple[list[float], list[list[int]]]:
        requests.write("\n")
        requests.flush()
        result = answer()
        return result["seconds"], result["ids"]

    answer()
    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-cpu-engine-<dtype>.json")
    parser.add_argument("--vllm-python", help="python of an environment with vLLM's CPU wheel")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts = random_prompts(256)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_tiny_random(Path(temporary))
        turns = {
            "batchmix": turn_of(open_batchmix(folder, args.dtype), prompts),
            "transformers": turn_of(open_transformers(folder, args.dtype), prompts),
        }
        if args.vllm_python:
            turns["vllm"] = open_vllm(args.vllm_python, folder, prompts, args.dtype)
        seconds: dict[str, list[list[float]]] = {name: [] for name in turns}
        out: dict[str, list[list[int]]] = {}
        for _ in range(args.repeats):  # in turns, since other users of a machine come and go
            for name, turn in turns.items():
                taken, out[name] = turn()
                seconds[name].append(taken)
                print(f"{name}: {taken[0]:.1f} s, {taken[1]:.1f} s of CPU time", flush=True)
    tokens = len(prompts) * NEW_TOKENS
    rates = {name: round(tokens / statistics.median(wall for wall, _ in times), 1) for name, times in seconds.items()}
    same = {name: sum(a == b for a, b in zip(out["batchmix"], ids, strict=True)) for name, ids in out.items()}
    print(f"the median of {args.repeats} turns each:")
    for name, rate in rates.items():
        print(f"{name:<12} {rate:8,.0f} output tokens/s, batchmix is {rates['batchmix'] / rate:.2f} x;"
              f" the same tokens for {same[name]} of {len(prompts)} prompts")  # fmt: skip
    if args.save:
        save(f"engine-{args.dtype}", {"dtype": args.dtype, "work": "256 prompts of 16 to 512 tokens, 64 new tokens each", "output_tokens_per_second": rates,
                        "seconds": {name: [round(wall, 2) for wall, _ in times] for name, times in seconds.items()},
                        "cpu_seconds": {name: [round(cpu, 2) for _, cpu in times] for name, times in seconds.items()},
                        "prompts_with_the_same_tokens": same, "load_average": round(os.getloadavg()[2], 1),
                        "environment": {name: os.environ[name] for name in OPENMP if name in os.environ}})  # fmt: skip


if __name__ == "__main__":
    main()
