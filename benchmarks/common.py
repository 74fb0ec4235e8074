"""What the benchmarks share: the work, the machine's name, and where results go."""

from __future__ import annotations

import os
import platform
import random
from pathlib import Path
from typing import Any

import torch

from batchmix.measure.result import save_result

RESULTS = Path(__file__).parent / "results"
TINY_RANDOM = {  # 39 M parameters
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def random_prompts(count: int, low: int = 16, high: int = 512, seed: int = 0) -> list[list[int]]:
    """Token ids of prompts whose lengths are uniform in low..high."""
    source = random.Random(seed)
    return [[source.randrange(3, 32000) for _ in range(source.randint(low, high))] for _ in range(count)]


def save_tiny_random(folder: Path) -> Path:
    """Write the random Mixtral, float32, weights wide enough that greedy choices are no near-ties."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**TINY_RANDOM)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    return folder


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    capabilities = torch.cpu.get_capabilities()
    vectors = [name for name in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if capabilities.get(name)]
    return {
        "cpu": capabilities.get("cpu_name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": vectors,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(what: str, result: dict[str, Any]) -> Path:
    """Write `<date>-cpu-<what>.json` into benchmarks/results."""
    path = save_result(RESULTS, "cpu", what, {"machine": machine(), **result})
    print(f"written: benchmarks/results/{path.name}")
    return path
