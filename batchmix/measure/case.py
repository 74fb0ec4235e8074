"""One measurement: a kernel on one piece of work, its oracle, and the peers that do the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """`run` is timed. `check` gives its largest error against the oracle, relative to the oracle's largest value."""

    kernel: str
    work: str  # "16,384 tokens"
    dtype: str
    run: Run
    check: Callable[[], float]
    tolerance: float  # of `check`
    flops: float = 0.0  # operations that the work needs
    bytes: float = 0.0  # bytes that have to move, each once
    rate: str = "bfloat16"  # the ceiling that `flops` are compared with
    peers: Mapping[str, Run] = field(default_factory=dict)
    of_host: bool = False  # the host's time for the launch is what counts, not the device's for the work


@dataclass(frozen=True)
class Shape:
    """The sizes of a Mixtral that kernels see."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {
    "8x7b": Shape(4096, 14336, 8, 2, 32, 8, 128, 32000),
    "8x22b": Shape(6144, 16384, 8, 2, 48, 8, 128, 32768),
    "tiny": Shape(128, 128, 8, 2, 4, 2, 32, 500),  # for Triton's interpreter
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite where something is not finite."""
    actual, expected = actual.double(), expected.double()
    if not bool(actual.isfinite().all()):
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def random(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers of the given standard deviation, the same on every run. On the meta device no numbers at all."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    source = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=source, device=device) * scale).to(dtype)
