"""The expert feed-forward: weight formats, token counts, and who else does it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchmix.kernels import reference
from batchmix.kernels.moe import moe
from batchmix.kernels.quantize import (
    dequantize_blocks,
    dequantize_groups,
    dequantize_rows,
    quantize_blocks,
    quantize_groups,
    quantize_rows,
)
from batchmix.measure.case import Case, Run, Shape, random, relative_error

FP8 = torch.float8_e4m3fn
Stored = tuple[Tensor, Tensor | None]  # weights and their scales
FORMATS = ("bfloat16", "float16", "float32", "fp8", "fp8_block", "int8", "int4")
# Against the float32 oracle on the same (dequantised) weights: what rounding of activations to the format costs.
_TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "fp8": 0.1, "fp8_block": 0.1}
_CHECKED = 16  # tokens compared with the oracle, which takes them one at a time
_BATCHED_MM_TOKENS = 32  # transformers' batched_mm copies the experts' weights for every token


def stored(weight: Tensor, form: str) -> Stored:
    """[E, N, K] in a weight format, and its scales."""
    if form in ("bfloat16", "float16", "float32"):
        return weight.to(getattr(torch, form)), None
    if form == "int4":
        return quantize_groups(weight)
    if form == "fp8_block":
        return quantize_blocks(weight)
    return quantize_rows(weight, FP8 if form == "fp8" else torch.int8)


def restored(weight: Tensor, scale: Tensor | None) -> Tensor:
    """What the stored weights stand for, float32 [E, N, K]."""
    if scale is None:
        return weight.float()
    if weight.dtype == torch.uint8:
        return dequantize_groups(weight, scale, torch.float32)
    dequantize = dequantize_rows if scale.dim() == 2 else dequantize_blocks
    return dequantize(weight, scale, torch.float32)


def moe_cases(shape: Shape, formats: list[str], tokens: list[int], device: torch.device) -> Iterator[Case]:
    """`moe`, from router to combine, in each weight format."""
    hidden, width, experts = shape.hidden, shape.intermediate, shape.experts
    for form in formats:
        dtype = getattr(torch, form) if form in ("float16", "float32") else torch.bfloat16
        if device.type == "cpu" and dtype is torch.bfloat16:  # the interpreter multiplies bfloat16 wrongly
            dtype, form = torch.float32, "float32" if form == "bfloat16" else form

        def weights(*size: int, dtype: torch.dtype = dtype, seed: int) -> Tensor:
            return random(*size, device=device, dtype=dtype, scale=size[-1] ** -0.5, seed=seed)

        router = weights(experts, hidden, dtype=torch.float32, seed=0)
        w13 = stored(weights(experts, 2 * width, hidden, seed=1), form)
        w2 = stored(weights(experts, hidden, width, seed=2), form)
        for count in tokens:
            x = random(count, hidden, device=device, dtype=dtype, seed=3)
            yield _case(shape, form, x, router, w13, w2)


def _case(shape: Shape, form: str, x: Tensor, router: Tensor, w13: Stored, w2: Stored) -> Case:
    """Bytes: the weights of the experts that are chosen, once each, and the tokens in and out."""

    def run(batch_invariant: bool = False) -> Tensor:
        return moe(x, router, w13[0], w2[0], shape.top_k, w13_scale=w13[1], w2_scale=w2[1],
                   batch_invariant=batch_invariant)  # fmt: skip

    def check() -> float:
        rows = torch.linspace(0, len(x) - 1, min(_CHECKED, len(x)), device=x.device).long()
        expected = reference.moe(x[rows].float(), router, restored(*w13), restored(*w2), shape.top_k)
        return relative_error(run()[rows], expected)

    used = len(torch.unique(_routing(x, router, shape.top_k)[1]))
    weight_bytes = sum(tensor.nbytes for tensor in (*w13, *w2) if tensor is not None)
    return Case(
        "moe", f"{len(x):,} tokens", form, run, check, _TOLERANCES.get(form, 3e-2),
        flops=2.0 * len(x) * shape.top_k * 3 * shape.hidden * shape.intermediate,
        bytes=weight_bytes * used / shape.experts + 2 * x.nbytes,
        rate="fp8" if form in ("fp8", "fp8_block") else "bfloat16",
        peers={"batch_invariant": lambda: run(True)}
        | (_peers(shape, x, router, w13[0], w2[0]) if w13[1] is None else {}),
    )  # fmt: skip


def _routing(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, experts = F.linear(x.float(), router).softmax(-1).topk(top_k)
    return weights / weights.sum(-1, keepdim=True), experts


def _peers(shape: Shape, x: Tensor, router: Tensor, w13: Tensor, w2: Tensor) -> dict[str, Run]:
    """transformers' experts with our router's choice given, torch's grouped product alone, and one dense product."""
    weights, experts = _routing(x, router, shape.top_k)
    weights = weights.to(x.dtype)
    module: Any = _transformers_experts(shape, w13, w2)

    def transformers_experts(name: str) -> Run:
        def run() -> object:
            module.config._experts_implementation = name
            return module(x, experts, weights)

        return run

    names = ["eager", "grouped_mm", *(["batched_mm"] if len(x) <= _BATCHED_MM_TOKENS else [])]
    peers = {f"transformers {name}": transformers_experts(name) for name in names}
    order = experts.flatten().argsort()
    rows = x[order // shape.top_k]
    ends = torch.bincount(experts.flatten(), minlength=shape.experts).cumsum(0).int()

    def grouped_mm() -> Tensor:
        gate, up = torch._grouped_mm(rows, w13.transpose(1, 2), offs=ends).chunk(2, -1)
        return torch._grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)

    if x.dtype is torch.bfloat16:
        peers["torch grouped_mm, sorted rows given"] = grouped_mm
    dense = w13.flatten(0, 1)[: 3 * shape.intermediate]
    peers["one dense product of equal FLOPs"] = lambda: F.linear(rows, dense)
    return peers


def _transformers_experts(shape: Shape, w13: Tensor, w2: Tensor) -> object:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                           num_local_experts=shape.experts, num_experts_per_tok=shape.top_k)  # fmt: skip
    with torch.device("meta"):
        module: Any = MixtralExperts(config)
    module.gate_up_proj = torch.nn.Parameter(w13, requires_grad=False)
    module.down_proj = torch.nn.Parameter(w2, requires_grad=False)
    return module
