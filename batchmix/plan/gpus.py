"""What GPUs can do, from their makers' data sheets: dense bfloat16 TFLOP/s, memory in GB, memory bandwidth in GB/s."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from batchmix.errors import BatchmixError


@dataclass(frozen=True)
class GPU:
    """One card. Units: 1e12 floating-point operations a second, 1e9 bytes, 1e9 bytes a second."""

    name: str
    tflops: float
    memory_gb: float
    bandwidth_gbs: float


_GPUS = {
    # NVIDIA data sheets; where one states a figure with sparsity, half of it.
    "b200": GPU("NVIDIA B200", 2250, 180, 7700),
    "h200": GPU("NVIDIA H200 SXM", 989, 141, 4800),
    "h100": GPU("NVIDIA H100 SXM", 989, 80, 3350),
    "h100_pcie": GPU("NVIDIA H100 PCIe", 756, 80, 2000),
    "a100_80gb": GPU("NVIDIA A100 SXM 80 GB", 312, 80, 2039),
    "a100_40gb": GPU("NVIDIA A100 SXM 40 GB", 312, 40, 1555),
    "l40s": GPU("NVIDIA L40S", 362, 48, 864),
    "l4": GPU("NVIDIA L4", 121, 24, 300),
    "a10": GPU("NVIDIA A10", 125, 24, 600),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", 165, 24, 1008),
    # AMD data sheet.
    "mi300x": GPU("AMD Instinct MI300X", 1307, 192, 5300),
}


def get_gpu(name: str) -> GPU:
    """The card called `name`; BatchmixError with the nearest name where there is none."""
    key = name.lower().replace("-", "_").replace(" ", "_")
    if key in _GPUS:
        return _GPUS[key]
    near = difflib.get_close_matches(key, _GPUS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? The" if near else "the"
    raise BatchmixError(f"plan.gpu={name}: not a GPU that is known here, {hint} choices are {', '.join(_GPUS)}")
