"""The kernels beside experts and attention: dense projections, norms, rotary embedding, quantising, sampling."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchmix.dtypes import dtype_name
from batchmix.kernels import reference
from batchmix.kernels.linear import linear
from batchmix.kernels.norm import add_rms_norm, rms_norm
from batchmix.kernels.quantize import quantize_rows
from batchmix.kernels.rotary import rotate_and_cache
from batchmix.kernels.row_state import Flag, Number, Real, State
from batchmix.kernels.sampling import sample
from batchmix.measure.attention import BLOCK
from batchmix.measure.case import Case, Run, Shape, random, relative_error

_CHECKED = 16  # tokens compared with the oracle
_EPS, _TOP_P = 1e-5, 0.9


def elementwise_cases(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Kernels that do little arithmetic: only their bytes count."""
    yield _norm_case(shape, tokens, device, dtype)
    yield _rotary_case(shape, tokens, device, dtype)
    if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9):
        yield _quantise_case(shape, tokens, device, dtype)


def _norm_case(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    x, residual = (random(tokens, shape.hidden, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = random(shape.hidden, device=device, dtype=dtype, seed=3)

    def run() -> Tensor:
        out: Tensor = add_rms_norm(x, residual, weight, _EPS)
        return out

    def check() -> float:
        some, total = x[:_CHECKED], residual[:_CHECKED].clone()
        expected = reference.rms_norm(some + total, weight, _EPS)
        return relative_error(add_rms_norm(some, total, weight, _EPS), expected)

    return Case("add + RMSNorm", f"{tokens:,} tokens", dtype_name(dtype), run, check, 3e-2, bytes=4 * x.nbytes)


def _rotary_case(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    qkv = random(tokens, (heads + 2 * kv_heads) * dim, device=device, dtype=dtype, seed=4)
    position = torch.arange(tokens, device=device)
    angle = torch.outer(position.float(), 1.0 / 1e6 ** (torch.arange(0, dim, 2, device=device) / dim))
    cos, sin = angle.cos(), angle.sin()
    cache = [torch.zeros(-(-tokens // BLOCK), kv_heads, BLOCK, dim, device=device, dtype=dtype) for _ in range(2)]
    places = position, position // BLOCK, position % BLOCK

    def run() -> Tensor:
        out: Tensor = rotate_and_cache(qkv, cos, sin, *places, *cache)
        return out

    def check() -> float:
        return relative_error(run(), reference.rotate(qkv.view(tokens, -1, dim)[:, :heads], cos, sin))

    moved = 2 * qkv.nbytes + cos.nbytes + sin.nbytes
    return Case("rotary + cache write", f"{tokens:,} tokens", dtype_name(dtype), run, check, 3e-2, bytes=moved)


def _quantise_case(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    x = random(tokens, shape.hidden, device=device, dtype=dtype, seed=1)

    def check() -> float:
        """0: the oracle's bits. It runs on the CPU, as CUDA divides by a number with an error of an ulp, 8e-8."""
        found = quantize_rows(x[:_CHECKED], torch.float8_e4m3fn)
        expected = reference.quantize_rows(x[:_CHECKED].cpu(), torch.float8_e4m3fn)
        return max(relative_error(one.cpu(), other) for one, other in zip(found, expected, strict=True))

    return Case(
        "quantise rows to fp8", f"{tokens:,} tokens", dtype_name(dtype), lambda: quantize_rows(x, torch.float8_e4m3fn),
        check, 0.0, bytes=x.nbytes + x.numel() + 4 * tokens,
    )  # fmt: skip


def launch_cases(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """What a launch costs the host: through torch.library, and without its dispatch. One op changes an argument."""
    x, residual = (random(1, shape.hidden, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = random(shape.hidden, device=device, dtype=dtype, seed=3)
    ops: dict[str, tuple[Any, tuple[object, ...]]] = {
        "RMSNorm": (rms_norm, (x, weight, _EPS)),
        "add + RMSNorm": (add_rms_norm, (x, residual, weight, _EPS)),
    }
    for name, (op, arguments) in ops.items():

        def check(op: Any = op, arguments: tuple[object, ...] = arguments) -> float:
            copies = [tuple(item.clone() if isinstance(item, Tensor) else item for item in arguments) for _ in range(2)]
            return relative_error(op.op(*copies[0]), op(*copies[1]))

        yield Case(
            "launch", f"{name} of 1 token through torch.library", dtype_name(dtype),
            partial(op.op, *arguments), check, 0.0,
            peers={"without its dispatch": partial(op, *arguments)}, of_host=True,
        )  # fmt: skip


def linear_case(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    """The projection to queries, keys and values with one tile for any number of rows: its cost beside cuBLAS."""
    columns = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    x = random(tokens, shape.hidden, device=device, dtype=dtype, seed=1)
    w = random(columns, shape.hidden, device=device, dtype=dtype, scale=shape.hidden**-0.5, seed=2)

    def run(batch_invariant: bool = True) -> Tensor:
        out: Tensor = linear(x, w, batch_invariant)
        return out

    def check() -> float:
        return relative_error(run()[:_CHECKED], x[:_CHECKED].float() @ w.float().T)

    peers: dict[str, Run] = {"torch (cuBLAS)": lambda: F.linear(x, w), "tiles by rows": lambda: run(False)}
    return Case(
        "batch-invariant linear", f"{tokens:,} tokens x {columns:,}", dtype_name(dtype), run, check, 3e-2,
        flops=2.0 * x.numel() * columns, bytes=x.nbytes + w.nbytes + tokens * columns * x.itemsize, peers=peers,
    )  # fmt: skip


def sampling_case(shape: Shape, rows: int, device: torch.device) -> Case:
    """Top-p 0.9 at temperature 1 for every row, with the chosen token's log-probability. Bytes: the logits, once."""
    logits = random(rows, shape.vocab, device=device, dtype=torch.float32, scale=3.0)
    state = torch.zeros(len(State), rows, dtype=torch.int64, device=device)
    numbers = torch.zeros(len(Number), rows, dtype=torch.int64, device=device)
    numbers[Number.SEED], numbers[Number.ROW_KEY], numbers[Number.BIAS_ROW] = 1, torch.arange(rows, device=device), -1
    reals = torch.zeros(len(Real), rows, device=device)
    reals[Real.TEMPERATURE], reals[Real.TOP_P], reals[Real.REPETITION_PENALTY] = 1.0, _TOP_P, 1.0
    flags = torch.zeros(len(Flag), rows, dtype=torch.bool, device=device)
    flags[Flag.WANTS_LOGPROB] = True
    eos_token_ids, biases = torch.tensor([2], device=device), torch.zeros(0, shape.vocab, device=device)
    stop_token_ids = torch.full((rows, 1), -1, device=device)

    def run() -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = sample(
            logits, state, numbers, reals, flags, eos_token_ids, stop_token_ids, biases, None, None, None, None
        )
        return found

    def check() -> float:
        """Infinite where a token lies outside the nucleus; else the error of its log-probability."""
        tokens, logprobs = run()
        expected = logits.double().log_softmax(-1)
        ordered = expected.exp().sort(-1, descending=True).values
        inside = ordered.cumsum(-1) - ordered < _TOP_P + 1e-6
        least = ordered.masked_fill(~inside, 1.0).amin(-1)  # of the nucleus
        chosen = expected.gather(1, tokens[:, None])[:, 0]
        outside = bool((chosen.exp() < least * (1 - 1e-6)).any())
        return float("inf") if outside else relative_error(logprobs, chosen)

    def by_sorting() -> Tensor:
        probabilities, ids = logits.softmax(-1).sort(-1, descending=True)
        kept = probabilities.cumsum(-1) - probabilities < _TOP_P
        return ids.gather(1, torch.multinomial(probabilities * kept, 1))

    return Case(
        "sampling", f"{rows:,} rows of {shape.vocab:,}, top-p {_TOP_P}", "float32", run, check, 1e-4,
        bytes=logits.nbytes, peers={"torch sort and multinomial": by_sorting},
    )  # fmt: skip
