"""What a decode step costs beside the model: blocks, tables, sampling, stop checks, with a model of no cost.

    python benchmarks/bench_step.py [--rows N] [--steps N] [--save]

The stand-in gives the same hidden states and logits at every call, over a vocabulary of 64 tokens, so that what is left
is the engine's own work in decode steps: it does not grow with the model. Sampling is told apart, since it is arithmetic over
[rows, vocabulary] that a GPU does in a kernel; and so are all of the backend's and torch's operators, which a GPU takes as
launches: what is left is the host's own. CPU time of one thread. What the host does on a GPU whenever rows come or go, to
find the KV blocks that they have in common, is timed apart.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from batchmix.engine.engine import Engine
from batchmix.engine.input_batch import InputBatch
from batchmix.engine.request import EngineLimits
from batchmix.kernels.shared_splits import find_shared_splits
from batchmix.memory import keep_freed_memory
from batchmix.models import torch_backend
from batchmix.models.async_copy import AsyncCopy
from batchmix.models.expert_load import ExpertLoad
from batchmix.models.kv_cache import KVCache
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.models.tensor_parallel import SINGLE_RANK
from batchmix.planning.planner import Limits, plan
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig

CONFIG = MixtralConfig(
    vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, head_dim=8, num_local_experts=2, num_experts_per_tok=2, max_position_embeddings=4096,
    rms_norm_eps=1e-5, rope_theta=1e6,
)  # fmt: skip
SAMPLINGS = {
    "greedy": SamplingConfig(temperature=0.0, ignore_eos=True, max_tokens=4000),
    "sampled, top_p 0.9": SamplingConfig(temperature=1.0, top_p=0.9, ignore_eos=True, max_tokens=4000),
}


BACKEND = ("attend", "sample", "post_update")  # operators that are a GPU's kernels


class NoModel:
    """As Mixtral, at no cost."""

    config = CONFIG
    tp = SINGLE_RANK
    stream = None
    streamed_bytes = 0

    def __init__(self, most: int) -> None:
        self.cos = self.sin = torch.zeros(CONFIG.max_position_embeddings, CONFIG.head_dim // 2)
        self.ops = SimpleNamespace(**{name: getattr(torch_backend, name) for name in torch_backend.__all__})
        self.expert_load = ExpertLoad(CONFIG.num_hidden_layers, CONFIG.num_local_experts, torch.device("cpu"))
        self._hidden = torch.zeros(most, CONFIG.hidden_size)
        self._logits = torch.randn(most, CONFIG.vocab_size)

    def __call__(self, token_ids: Tensor, attend: object) -> Tensor:
        return self._hidden[: len(token_ids)]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._logits[: len(hidden)].clone()


class OperatorSeconds(TorchFunctionMode):
    """Adds up the time inside torch's operators, but for that in the backend's own."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.backend = 0.0, dict.fromkeys(BACKEND, 0.0)
        self._inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.process_time()
        result = func(*args, **(kwargs or {}))
        self.seconds += 0.0 if self._inside else time.process_time() - started
        return result

    def timed(self, name: str) -> Any:
        """One of the backend's operators. What it makes, it frees at its next call: no work of the host's own."""
        kept: list[Any] = []

        def operator(*arguments: Any) -> Any:
            self._inside, started = True, time.process_time()
            kept[:] = []
            kept.append(getattr(torch_backend, name)(*arguments))
            self.backend[name] += time.process_time() - started
            self._inside = False
            return kept[0]

        return operator


def step_seconds(rows: int, steps: int, sampling: SamplingConfig) -> np.ndarray:
    """Of `steps` decode steps of `rows` rows of 100 to 1,100 tokens: seconds, those of the operators BACKEND and of others.

    float64 [steps, 1 + len(BACKEND) + 1]; the last are those of as many steps more, which measuring makes slower as a whole.
    """
    operators = OperatorSeconds()
    cache = KVCache(CONFIG, rows * 40, 64, torch.float32, torch.device("cpu"))
    model = NoModel(1 << 20)
    for name in BACKEND:
        setattr(model.ops, name, operators.timed(name))
    engine = Engine(
        model, cache, EngineLimits(rows, 8192, 2048, cache.num_blocks, 64, model.ops.row_tile, model.ops.cuts_prompts),
        partial(InputBatch, CONFIG.vocab_size, (2,), None, AsyncCopy(torch.device("cpu")), None),
    )  # type: ignore[arg-type]  # fmt: skip
    lengths = np.linspace(100, 1100, rows).astype(int)
    prompts = [Prompt(i, str(i), {}, np.full(length, 5), sampling) for i, length in enumerate(lengths)]
    batches = plan(prompts, Limits(rows, engine.scheduler.pool.num_blocks, 64, rows))
    for _ in engine.enqueue(prompt for batch in batches for prompt in batch.prompts):
        pass
    with torch.inference_mode():
        while engine.scheduler.waiting or engine.scheduler.prefilling:
            engine.step()
        assert len(engine.scheduler.running) == rows
        seconds = np.empty((steps, 2 + len(BACKEND)))
        for step in range(steps):
            operators.backend = dict.fromkeys(BACKEND, 0.0)
            started = time.process_time()
            engine.step()
            seconds[step, :-1] = time.process_time() - started, *operators.backend.values()
        with operators:
            for step in range(steps):
                before = operators.seconds
                engine.step()
                seconds[step, -1] = operators.seconds - before
    return seconds


def shared_splits_ms(rows: int, shared: int) -> float:
    """To find what `rows` rows of 1,100 tokens have in common, whose first `shared` tokens are the same."""
    blocks, common = -(-1100 // 64), shared // 64
    table = np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)
    table[:, :common] = table[0, :common]
    arguments = torch.from_numpy(table), torch.full((rows,), 1100), 64, 4, rows
    took = []
    for _ in range(50):
        started = time.process_time()
        find_shared_splits(*arguments)
        took.append(time.process_time() - started)
    return float(np.median(took)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-cpu-step.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as an engine that is started does
    found = {}
    for name, sampling in SAMPLINGS.items():
        seconds = step_seconds(args.rows, args.steps, sampling)[5:] * 1e3
        whole, *parts = np.median(seconds, 0)
        slow, host = np.quantile(seconds[:, 0], 0.99), whole - sum(parts)
        print(f"{name}: {whole:.2f} ms a step beside the model at {args.rows:,} rows (99 of 100 steps within {slow:.2f} ms),"
              f" {parts[1]:.2f} of them to sample the tokens; without the operators of backend and torch {host:.2f} ms")  # fmt: skip
        found[name] = {"median_ms": round(whole, 3), "sample_ms": round(parts[1], 3), "99_percent_ms": round(slow, 3),
                       "host_ms": round(host, 3)}  # fmt: skip
    shared = {tokens: round(shared_splits_ms(args.rows, tokens), 3) for tokens in (0, 700)}
    print(f"shared KV blocks of {args.rows:,} rows, found anew: {shared[0]:.2f} ms where there are none, {shared[700]:.2f} ms"
          " where all rows share 700 tokens")  # fmt: skip
    if args.save:
        save("step", {"rows": args.rows, "steps": args.steps, "beside_the_model": found,
                      "shared_kv_blocks_ms": shared})  # fmt: skip


if __name__ == "__main__":
    main()
