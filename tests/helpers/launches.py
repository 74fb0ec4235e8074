"""The launches that are compiled ahead of time: each launcher as the engine calls it, on Mixtral-8x7B's shapes.

A new kernel is one more function here. Its tensors are `empty(...)`: memory that nothing reads, so gigabytes cost
nothing. One function may call its launcher many times (every number of tokens at which a table changes tiles): a
kernel with the same arguments compiles once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ahead_of_time import ARCHES
from kernel_checks import row_arguments
from torch import Tensor

from batchmix.kernels.row_state import Flag, Number, Real, RowTensors, State

D, F, E, H, G, C, V = 4096, 14336, 8, 32, 8, 128, 32000  # Mixtral-8x7B
FP8 = torch.float8_e4m3fn
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BLOCKS = {State: torch.int64, Number: torch.int64, Real: torch.float32, Flag: torch.bool}
FP8_ARCHES = ["sm_89", "sm_90", "sm_100", "gfx942"]  # triton has no e4m3 below sm_89


@dataclass(frozen=True)
class Call:
    """One way to call a launcher."""

    run: Callable[[], None]
    arches: list[str]
    wgmma: tuple[str, ...]  # kernels that have to use wgmma on sm_90
    quick: bool  # whether the default test run compiles it for sm_90


CALLS: dict[str, Call] = {}


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def launch(
    *,
    arches: list[str] | None = None,
    wgmma: tuple[str, ...] = (),
    quick: str | None = None,
    **variants: dict[str, Any],
) -> Callable[[Callable[..., None]], None]:
    """Register a function that calls a launcher, once for each combination of its arguments' `variants`.

    A variant is known by its label, and a call by its function and labels ("moe-bf16"). `quick` is the name of the
    call that the default test run compiles for sm_90.
    """

    def register(function: Callable[..., None]) -> None:
        for labels in itertools.product(*variants.values()):
            name = "-".join((function.__name__, *labels))
            arguments = {key: variants[key][label] for key, label in zip(variants, labels, strict=True)}
            CALLS[name] = Call(partial(function, **arguments), arches or ARCHES, wgmma, name == quick)

    return register


@launch(tile={"small": 64, "spills": 512}, wgmma=("matmul_kernel",))
def toy(tile: int) -> None:
    """Tests of the checks themselves: an accumulator of 512x128 over 4 warps cannot be held in registers."""
    from toy_matmul import matmul

    matmul(empty(512, 256, dtype=torch.float16), empty(128, 256, dtype=torch.float16), tile)


@launch(dtype=DTYPES, arches=FP8_ARCHES, quick="quantize_fp8-bf16")
def quantize_fp8(dtype: torch.dtype) -> None:
    from batchmix.kernels.quantize import dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows

    for size in (D, F):  # tokens, before w13 and before w2
        quantize_rows(empty(16384, size, dtype=dtype), FP8)
    w13, rows, blocks = empty(E, 2 * F, D, dtype=FP8), empty(E, 2 * F, dtype=torch.float32), [E, 2 * F // 128, D // 128]
    dequantize_rows(w13, rows, dtype)
    quantize_blocks(empty(E, 2 * F, D, dtype=dtype))
    dequantize_blocks(w13, empty(*blocks, dtype=torch.float32), dtype)


@launch(dtype=DTYPES, quick="quantize_int-bf16")
def quantize_int(dtype: torch.dtype) -> None:
    from batchmix.kernels.quantize import dequantize_groups, dequantize_rows, quantize_groups, quantize_rows

    w2 = empty(E, D, F, dtype=dtype)
    quantize_rows(w2, torch.int8)
    dequantize_rows(empty(E, D, F, dtype=torch.int8), empty(E, D, dtype=torch.float32), dtype)
    quantize_groups(w2)
    packed, scales = empty(E, D, F // 2, dtype=torch.uint8), empty(E, D, F // 128, dtype=torch.float32)
    dequantize_groups(packed, scales, dtype)


def moe(format: str, rows: int) -> None:
    from batchmix.kernels.moe import moe

    dtype = MOE_DTYPES.get(format, torch.bfloat16)
    (w13, w13_scale), (w2, w2_scale) = stored_weights(format, 2 * F, D), stored_weights(format, D, F)
    x, router = empty(rows * E // 2, D, dtype=dtype), empty(E, D, dtype=torch.float32)
    load = {"counts": empty(E, dtype=torch.int64), "num_valid": empty(1, dtype=torch.int32)}
    moe(x, router, w13, w2, 2, w13_scale=w13_scale, w2_scale=w2_scale, residual=x, **load)


def stored_weights(format: str, n: int, k: int) -> tuple[Tensor, Tensor | None]:
    """All experts' weights [E, n, k] in a format, and their scales."""
    stored, pack = {"fp8": (FP8, 1), "fp8_block": (FP8, 1), "int8": (torch.int8, 1), "int4": (torch.uint8, 2)}.get(
        format, (MOE_DTYPES.get(format, torch.bfloat16), 1)
    )
    scales = {"fp8_block": (128, 128), "int4": (1, 128), "fp8": (1, 0), "int8": (1, 0)}.get(format)
    return quantized(n, k, stored, pack, scales)


def quantized(
    n: int, k: int, dtype: torch.dtype, pack: int, scales: tuple[int, int] | None
) -> tuple[Tensor, Tensor | None]:
    """Stacked weights with a scale for each `scales[0]` rows of `scales[1]` columns, 0 for the whole row."""
    weight = empty(E, n, k // pack, dtype=dtype)
    if scales is None:
        return weight, None
    shape = (E, n // scales[0], k // scales[1]) if scales[1] else (E, n)
    return weight, empty(*shape, dtype=torch.float32)


MOE_DTYPES = {**DTYPES, "fp32": torch.float32, "float16": torch.float16, "float32": torch.float32}
EXPERT_ROWS = {"16": 16, "64": 64, "128": 128, "1024": 1024}  # one for each tile of a format
WGMMA = ("_experts_kernel",)
launch(wgmma=WGMMA, quick="moe-bf16-1024", format={key: key for key in DTYPES}, rows=EXPERT_ROWS)(moe)
launch(wgmma=WGMMA, arches=FP8_ARCHES, format={key: key for key in ("fp8", "fp8_block")}, rows=EXPERT_ROWS)(moe)
launch(wgmma=WGMMA, format={key: key for key in ("int8", "int4")}, rows=EXPERT_ROWS)(moe)
launch(format={"fp32": "fp32"}, rows={"64": 64})(moe)


def tile_table(path: Path) -> None:
    """Every tile that a shipped table has; `moe` has the rule's."""
    from batchmix.kernels import tiles
    from batchmix.kernels.moe import launch_experts

    format = path.stem.rpartition("-")[2]
    for key, by_rows in tiles.read_table(path).items():
        kind, n, k = re.fullmatch(r"(up|down) N=(\d+) K=(\d+)", key).groups()  # type: ignore[union-attr]
        columns, depth, top_k = int(n), int(k), 2 if kind == "up" else 1
        weights = stored_weights(format, 2 * columns if kind == "up" else columns, depth)
        for rows, tile in by_rows.items():
            if tile is None:
                continue
            pairs = rows * E
            x, x_scale = empty(pairs // top_k, depth, dtype=MOE_DTYPES.get(format, torch.bfloat16)), None
            out = empty(pairs, columns, dtype=x.dtype)
            if format.startswith("fp8"):
                x, x_scale = empty(*x.shape, dtype=FP8), empty(len(x), dtype=torch.float32)
            launch_experts(
                x, x_scale, *weights, empty(pairs, dtype=torch.int32), empty(E + 1, dtype=torch.int32),
                None if kind == "up" else empty(pairs, dtype=torch.float32), out, top_k,
                tile,
            )  # fmt: skip


for path in sorted((Path(__file__).parents[2] / "kernels/configs").glob("*.json")):
    CALLS[f"tile_table-{path.stem}"] = Call(partial(tile_table, path), [path.stem.partition("-")[0]], WGMMA, quick=True)


@launch()
def single() -> None:
    """One token, row, split and so on: triton makes constants of integers that are 1, the interpreter does not."""
    from batchmix.kernels.attention_decode import decode_attention, plan_decode
    from batchmix.kernels.attention_prefill import plan_prefill, prefill_attention
    from batchmix.kernels.linear import linear
    from batchmix.kernels.moe import moe
    from batchmix.kernels.norm import add_rms_norm, rms_norm
    from batchmix.kernels.post_update import post_update
    from batchmix.kernels.quantize import quantize_groups, quantize_rows
    from batchmix.kernels.rotary import rotate_and_cache
    from batchmix.kernels.sampling import sample

    bf16, fp32, int64 = torch.bfloat16, torch.float32, empty(1, dtype=torch.int64)
    x, square = empty(1, 64, dtype=bf16), empty(64, 64, dtype=bf16)
    for experts, top_k in ((1, 1), (8, 2)):
        moe(
            x,
            empty(experts, 64, dtype=fp32),
            empty(experts, 128, 64, dtype=bf16),
            square.expand(experts, 64, 64).contiguous(),
            top_k,
        )
    for batch_invariant in (False, True):
        linear(x, square, batch_invariant)
    rms_norm(x, square[0], 1e-5)
    add_rms_norm(x, x.clone(), square[0], 1e-5)
    quantize_rows(x, torch.int8)
    quantize_groups(empty(1, 128, dtype=bf16))
    cache, table = empty(1, 1, 64, 64, dtype=bf16), torch.zeros(1, 1, dtype=torch.int32)
    angles = empty(1, 32, dtype=fp32)
    rotate_and_cache(empty(1, 192, dtype=bf16), angles, angles, int64, int64, int64, cache, cache.clone())
    q = empty(1, 1, 64, dtype=bf16)
    prefill_attention(q, cache, cache, *plan_prefill([(0, 0, 1)], table, 1, 1, bf16))
    decode_attention(q, cache, cache, *plan_decode(table, torch.ones(1, dtype=torch.int32), 64, 1))
    rows = row_tensors(1, 9, history=1, penalties=True, logprobs=True)
    rows = replace(rows, stop_token_ids=int64[None], automata=empty(1, 10, dtype=torch.int32))
    sample(empty(1, 9, dtype=fp32), **row_arguments(sample, rows))
    post_update(int64, empty(1, dtype=fp32), **row_arguments(post_update, rows))


@launch(
    dtype={"fp16": torch.float16, "bf16": torch.bfloat16, "bf16-fp8": FP8},
    wgmma=("prefill_attention_kernel",),
    quick="attention_prefill-bf16",
)
def attention_prefill(dtype: torch.dtype) -> None:
    from batchmix.kernels.attention_prefill import plan_prefill, prefill_attention

    query = torch.bfloat16 if dtype == FP8 else dtype
    scale = empty(G, dtype=torch.float32) if dtype == FP8 else None
    for heads, dim, size in ((H, C, 64), (48, C, 16), (H, 64, 128)):  # 48: 8x22B
        cache = empty(8, G, size, dim, dtype=dtype)
        plan = plan_prefill([(0, 0, 1000)], torch.zeros(1, 64, dtype=torch.int32), 1000, heads // G, query)
        q = empty(1000, heads, dim, dtype=query)
        prefill_attention(q, cache, cache, *plan, scale, scale)


@launch(dtype={"fp16": torch.float16, "bf16": torch.bfloat16, "bf16-fp8": FP8}, quick="attention_decode-bf16")
def attention_decode(dtype: torch.dtype) -> None:
    from batchmix.kernels.attention_decode import decode_attention, plan_decode
    from batchmix.kernels.shared_splits import find_shared_splits

    query = torch.bfloat16 if dtype == FP8 else dtype
    scale = empty(G, dtype=torch.float32) if dtype == FP8 else None
    for heads, dim, size in ((H, C, 64), (48, C, 16), (H, 64, 128)):  # 48: 8x22B
        cache = empty(8, G, size, dim, dtype=dtype)
        table, context = torch.zeros(64, 1024 // size, dtype=torch.int32), torch.full((64,), 700, dtype=torch.int32)
        shared = find_shared_splits(table, context, size, heads // G)
        plan = plan_decode(table, context, size, heads // G, shared)
        decode_attention(empty(64, heads, dim, dtype=query), cache, cache, *plan, scale, scale)


@launch(wgmma=("_linear_kernel",), quick="linear-bf16-4096", dtype=DTYPES, rows={"16": 16, "64": 64, "4096": 4096})
def linear(dtype: torch.dtype, rows: int) -> None:
    from batchmix.kernels.linear import linear

    x = empty(rows, D, dtype=dtype)
    for columns in ((H + 2 * G) * C, D, V):  # queries, keys and values; attention's output; logits
        for batch_invariant in (False, True):
            linear(x, empty(columns, D, dtype=dtype), batch_invariant)


@launch()
def linear_fp32() -> None:
    from batchmix.kernels.linear import linear

    linear(empty(64, D, dtype=torch.float32), empty(D, D, dtype=torch.float32))


@launch(dtype=DTYPES, quick="norms-bf16")
def norms(dtype: torch.dtype) -> None:
    from batchmix.kernels.norm import add_rms_norm, rms_norm

    for width in (D, 6144):  # 8x22B's
        x, weight = empty(64, width, dtype=dtype), empty(width, dtype=dtype)
        rms_norm(x, weight, 1e-5)
        add_rms_norm(x, empty(64, width, dtype=dtype), weight, 1e-5)


def _rotate_and_cache(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    from batchmix.kernels.rotary import rotate_and_cache

    integers = [empty(64, dtype=torch.int64) for _ in range(3)]
    scales = [empty(G, dtype=torch.float32) for _ in range(2)] if cache_dtype == FP8 else []
    for dim in (32, 64, 128):
        angles = [empty(4096, dim // 2, dtype=torch.float32) for _ in range(2)]
        caches = [empty(10, G, 64, dim, dtype=cache_dtype) for _ in range(2)]
        rotate_and_cache(empty(64, (H + 2 * G) * dim, dtype=dtype), *angles, *integers, *caches, *scales)


@launch(dtype=DTYPES, quick="rotary-bf16")
def rotary(dtype: torch.dtype) -> None:
    _rotate_and_cache(dtype, dtype)


@launch(dtype=DTYPES, quick="rotary_fp8_cache-bf16")
def rotary_fp8_cache(dtype: torch.dtype) -> None:
    _rotate_and_cache(dtype, FP8)


def row_tensors(
    rows: int, vocab: int, history: int = 1000, penalties: bool = False, guided: bool = False, logprobs: bool = False
) -> RowTensors:
    """As the engine has them, of a step of all its slots."""
    blocks = [empty(len(fields), rows, dtype=dtype) for fields, dtype in BLOCKS.items()]
    return RowTensors(
        *blocks,
        stop_token_ids=empty(rows, 4, dtype=torch.int64),
        eos_token_ids=empty(1, dtype=torch.int64),
        biases=empty(3, vocab, dtype=torch.float32),
        automata=empty(9, vocab + 1, dtype=torch.int64),
        output_counts=empty(rows, vocab, dtype=torch.int32) if penalties else None,
        in_prompt=empty(rows, vocab, dtype=torch.bool) if penalties else None,
        grammar_states=empty(1000, 2, dtype=torch.int32) if guided else None,
        grammar_classes=empty(3, vocab, dtype=torch.int32) if guided else None,
        history=empty(rows, history, dtype=torch.int32),
        logprob_history=empty(rows, history, dtype=torch.float32) if logprobs else None,
    )


@launch(quick="sampling")
def sampling() -> None:
    from batchmix.kernels.sampling import sample

    rows = 512
    sizes = (V, True, False), (V, False, False), (V, True, True), (32002, True, False), (32768, False, False)
    for vocab, penalties, guided in (*sizes, (300, False, False)):
        tensors = row_tensors(rows, vocab, penalties=penalties, guided=guided)
        sample(empty(rows, vocab, dtype=torch.float32), **row_arguments(sample, tensors))
        narrowed = tensors.narrow(rows - 1, 1)  # of a prefill: rows that start behind others
        sample(empty(len(narrowed.history), vocab, dtype=torch.float32), **row_arguments(sample, narrowed))


@launch(quick="post_update")
def post_update() -> None:
    from batchmix.kernels.post_update import post_update

    rows = 512
    tokens, logprobs = empty(rows, dtype=torch.int64), empty(rows, dtype=torch.float32)
    for penalties, guided, logged in ((False, False, False), (True, False, True), (True, True, False)):
        tensors = row_tensors(rows, V, penalties=penalties, guided=guided, logprobs=logged)
        post_update(tokens, logprobs if logged else None, **row_arguments(post_update, tensors))
