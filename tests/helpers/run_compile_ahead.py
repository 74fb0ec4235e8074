"""Compile a small model's kernels for an H200 before a run, then launch what other steps launch: what was not compiled.

Its own process, because the tests' interpreter compiles nothing. Prints JSON; Triton's cache is where the environment says.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import torch
    import triton
    from ahead_of_time import _Driver
    from triton.runtime.driver import driver

    from batchmix.engine.compile_ahead import CompileAhead, CompileClock, Steps
    from batchmix.engine.model_runner import run_largest_step
    from batchmix.kernels.gpu import H200, assume_gpu
    from batchmix.models.mixtral import Mixtral
    from batchmix.models.mixtral_config import MixtralConfig
    from batchmix.models.triton_ops import TritonOperators
    from batchmix.models.weights import empty_weights
    from batchmix.observability.engine_stats import EngineStats

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("batchmix").addHandler(handler)
    logging.getLogger("batchmix").setLevel(logging.INFO)
    config = MixtralConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=2048,
        rms_norm_eps=1e-5, rope_theta=1e6,
    )  # fmt: skip
    dtype = torch.bfloat16
    steps = Steps(config, dtype, dtype, None, 200, 600, 2048, False, True)
    for _ in range(2):
        CompileAhead(steps, H200, 2).finish()

    stats = EngineStats()
    clock = CompileClock(stats)
    missed: list[str] = []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or missed.append(src.name)
    driver.set_active(_Driver("sm_90"))  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    with assume_gpu(H200):
        operators = TritonOperators(False, True)
        model = Mixtral(config, empty_weights(config, dtype, torch.device("cpu")), operators, 2048)
        for rows in (1, 7, 40, 129, 200):
            run_largest_step(model, rows, 0, dtype)
        for tokens in (1, 33, 150, 600):
            run_largest_step(model, 1, tokens, dtype)
        found["missed"] = list(missed)
        triton.knobs.compilation.listener = clock
        Mixtral(config, empty_weights(config, torch.float16, torch.device("cpu")), operators, 2048)
        operators.rms_norm(torch.empty(3, 256, dtype=torch.float16), torch.empty(256, dtype=torch.float16), 1e-5)
    print(json.dumps(found | {"said": said, "counted": stats.kernels_compiled, "took": stats.compile_seconds}))


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    main()
