"""What GPUs can do, from their makers' data sheets: dense bfloat16 TFLOP/s, memory, memory and host link bandwidth."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from batchmix.errors import BatchmixError


@dataclass(frozen=True)
class GPU:
    """One card. Units: 1e12 floating-point operations a second, 1e9 bytes, 1e9 bytes a second."""

    name: str
    tflops: float
    memory_gb: float
    bandwidth_gbs: float
    link_gbs: float  # host to device; half of what a data sheet gives for both directions
    fp8: bool = True  # whether Triton multiplies e4m3 there: see engine/device.py


_PCIE4, _PCIE5 = 32, 64  # 16 lanes
_GPUS = {
    # NVIDIA data sheets; where one states a figure with sparsity, half of it.
    "b200": GPU("NVIDIA B200", 2250, 180, 7700, _PCIE5),
    "h200": GPU("NVIDIA H200 SXM", 989, 141, 4800, _PCIE5),
    "h100": GPU("NVIDIA H100 SXM", 989, 80, 3350, _PCIE5),
    "h100_pcie": GPU("NVIDIA H100 PCIe", 756, 80, 2000, _PCIE5),
    "a100_80gb": GPU("NVIDIA A100 SXM 80 GB", 312, 80, 2039, _PCIE4, fp8=False),
    "a100_40gb": GPU("NVIDIA A100 SXM 40 GB", 312, 40, 1555, _PCIE4, fp8=False),
    "l40s": GPU("NVIDIA L40S", 362, 48, 864, _PCIE4),
    "l4": GPU("NVIDIA L4", 121, 24, 300, _PCIE4),
    "a10": GPU("NVIDIA A10", 125, 24, 600, _PCIE4, fp8=False),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", 165, 24, 1008, _PCIE4),
    # AMD data sheet.
    "mi300x": GPU("AMD Instinct MI300X", 1307, 192, 5300, _PCIE5, fp8=False),
}


def known_gpu(name: str) -> GPU | None:
    """The card that torch calls `name`, such as NVIDIA A100-SXM4-80GB; None where it is not known here."""
    words = set(re.split(r"[^a-z0-9]+", name.lower().replace("rtx ", "rtx")))
    keys = [key for key in _GPUS if words.issuperset(key.split("_"))]
    return _GPUS[max(keys, key=len)] if keys else None


def get_gpu(name: str) -> GPU:
    """The card called `name`; BatchmixError with the nearest name where there is none."""
    key = name.lower().replace("-", "_").replace(" ", "_")
    if key in _GPUS:
        return _GPUS[key]
    near = difflib.get_close_matches(key, _GPUS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? The" if near else "the"
    raise BatchmixError(f"plan.gpu={name}: not a GPU that is known here, {hint} choices are {', '.join(_GPUS)}")
