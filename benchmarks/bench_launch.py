"""What launching a decode layer costs the host: every kernel of ours, with the launches themselves stubbed.

    python benchmarks/bench_launch.py [--rows N] [--turns N] [--save]

The launchers of Mixtral-8x7B's decode layer run as they do on an H200, on memory that nothing touches. Kernels are
compiled for sm_90, and a stand-in for Triton's driver takes each launch and does nothing. What is left is the Python part:
of our launchers, and of Triton's. torch's own products are left out: they are cuBLAS's, whose launches need a GPU.
The part for a step that is not captured, such as one with forced tokens, and for the capture of one that is.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from common import save
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from batchmix.engine.input_batch import InputBatch
from batchmix.engine.request import EngineLimits
from batchmix.kernels.gpu import H200, assume_gpu
from batchmix.models.async_copy import AsyncCopy
from batchmix.models.kv_cache import KVCache
from batchmix.models.mixtral import Mixtral
from batchmix.models.mixtral_config import MixtralConfig
from batchmix.models.step_tokens import StepTokens
from batchmix.models.triton_ops import TritonOperators
from batchmix.models.weights import empty_weights

LAYERS = 8  # enough that what a step does once does not count
CONFIG = MixtralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=4096,
    rms_norm_eps=1e-5, rope_theta=1e6,
)  # fmt: skip
WIDTH = 16  # blocks of a row that a step looks at


class StubDriver:
    """Triton's driver of an H200 that takes launches and does nothing."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": H200.shared_memory},
            load_binary=lambda *_: (1, 1, 0, 0, 1024),  # module, function, registers, spills, most threads
        )

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def launch(*_: Any) -> None:
            self.launches += 1

        return launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class NoProducts(TritonOperators):
    """The operators without torch's products."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[tuple[int, int], Tensor] = {}

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        shape = len(x), len(weight)
        if shape not in self.outputs:
            self.outputs[shape] = torch.empty(shape, dtype=x.dtype)
        return self.outputs[shape]


class Embedding:
    """Gives the same rows for any tokens."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, token_ids: Tensor) -> Tensor:
        return self.rows


def layer_seconds(rows: int, turns: int) -> tuple[list[float], float]:
    """Seconds of the host for a decode layer of `rows` rows, in each turn; and launches a layer."""
    stub = StubDriver()
    driver.set_active(stub)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    with assume_gpu(H200), torch.inference_mode():
        ops = NoProducts()
        model = Mixtral(CONFIG, empty_weights(CONFIG, torch.bfloat16, cpu), ops, 4096)
        model.weights.layers *= LAYERS
        model.expert_load = [model.expert_load[0]] * LAYERS  # type: ignore[assignment]
        # Looking up embeddings would touch memory.
        model.weights.embedding = Embedding(torch.empty(rows, CONFIG.hidden_size, dtype=torch.bfloat16))  # type: ignore[assignment]
        cache = KVCache(replace(CONFIG, num_hidden_layers=LAYERS), 1, 64, torch.bfloat16, cpu)
        batch = InputBatch(
            CONFIG.vocab_size, (), None, AsyncCopy(cpu), None, EngineLimits(rows, rows, WIDTH * 64, 1, 64)
        )
        tokens = torch.zeros(rows, dtype=torch.int64)
        attend = ops.attend(model, cache, StepTokens(rows, batch.decode_tokens(0, rows, WIDTH)))
        model(tokens, attend)  # compiles
        found = []
        gc.disable()
        for _ in range(turns):
            launches, started = stub.launches, time.thread_time()
            model(tokens, attend)
            found.append((time.thread_time() - started) / LAYERS)
        gc.enable()
    return found, (stub.launches - launches) / LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=564, help="of the decode step (564)")
    parser.add_argument("--turns", type=int, default=100, help="steps that are timed (100)")
    parser.add_argument("--save", action="store_true", help="write a file into benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds, launches = layer_seconds(arguments.rows, arguments.turns)
    median = statistics.median(seconds)
    print(
        f"a decode layer of {arguments.rows} rows: {launches:.1f} launches, {median * 1e6:,.0f} us of the host (median"
        f" of {len(seconds)}; {min(seconds) * 1e6:,.0f} to {max(seconds) * 1e6:,.0f})"
    )
    if arguments.save:
        save("launch", {
            "rows": arguments.rows, "turns": len(seconds), "launches_per_layer": round(launches, 2),
            "host_seconds_per_layer": {"median": median, "least": min(seconds), "most": max(seconds)},
        })  # fmt: skip


if __name__ == "__main__":
    main()
