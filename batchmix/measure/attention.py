"""Attention over the paged cache: prefill, decode, decode over a shared prefix."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from batchmix.dtypes import dtype_name
from batchmix.kernels import reference
from batchmix.kernels.attention_decode import DecodePlan, decode_attention, plan_decode
from batchmix.kernels.attention_prefill import plan_prefill, prefill_attention
from batchmix.kernels.shared_splits import find_shared_splits
from batchmix.measure.case import Case, Run, Shape, random, relative_error

BLOCK = 64  # tokens, the engine's
_CHECKED = 4  # rows, or queries of a prompt, compared with the oracle


class PagedRows:
    """`rows` rows of `length` tokens in a cache whose blocks lie in no order; the first `shared` tokens are one prompt."""

    def __init__(
        self, shape: Shape, rows: int, length: int, device: torch.device, dtype: torch.dtype, shared: int = 0
    ) -> None:
        self.shape, self.length = shape, length
        per_row, common = -(-length // BLOCK), shared // BLOCK
        own = per_row - common
        num_blocks = 1 + common + rows * own
        cache = (num_blocks, shape.kv_heads, BLOCK, shape.head_dim)
        self.keys, self.values = (random(*cache, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
        order = 1 + torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(3))
        table = torch.cat((order[:common].expand(rows, common), order[common:].view(rows, own)), 1)
        self.table = table.int()  # on the host
        self.bytes = 2 * (shared + rows * (length - shared)) * shape.kv_heads * shape.head_dim * self.keys.itemsize

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, G, length, C], copied out of the cache."""
        table = self.table.to(self.keys.device).long()
        return tuple(  # type: ignore[return-value]
            cache[table].transpose(1, 2).flatten(2, 3)[:, :, : self.length].contiguous()
            for cache in (self.keys, self.values)
        )


def prefill_case(shape: Shape, length: int, device: torch.device, dtype: torch.dtype) -> Case:
    """One prompt, causal. FLOPs: half of the full square."""
    rows = PagedRows(shape, 1, length, device, dtype)
    q = random(length, shape.heads, shape.head_dim, device=device, dtype=dtype)
    plan = plan_prefill([(0, 0, length)], rows.table.to(device), length, shape.heads // shape.kv_heads, dtype)
    keys, values = rows.dense()

    def run() -> Tensor:
        out: Tensor = prefill_attention(q, rows.keys, rows.values, *plan)
        return out

    def check() -> float:
        out, worst = run(), 0.0
        for token in torch.linspace(0, length - 1, _CHECKED).long().tolist():
            k, v = (tensor[0, :, : token + 1].transpose(0, 1).float() for tensor in (keys, values))
            expected = reference.attention(q[token : token + 1].float(), k, v)
            worst = max(worst, relative_error(out[token : token + 1], expected))
        return worst

    return Case(
        "prefill attention", f"{length:,} tokens", dtype_name(dtype), run, check, 3e-2,
        flops=2.0 * shape.heads * shape.head_dim * length**2,
        bytes=2 * q.nbytes + rows.bytes,
        peers=_dense_peers(q.transpose(0, 1)[None], keys, values, causal=True),
    )  # fmt: skip


def decode_case(shape: Shape, count: int, context: int, shared: int, device: torch.device, dtype: torch.dtype) -> Case:
    """One token of each of `count` rows, whose first `shared` tokens are one prompt: then our plain kernel is the peer."""
    rows = PagedRows(shape, count, context, device, dtype, shared)
    q = random(count, shape.heads, shape.head_dim, device=device, dtype=dtype)
    lengths = torch.full((count,), context, dtype=torch.int32)
    ratio = shape.heads // shape.kv_heads
    step = rows.table.to(device), lengths.to(device), BLOCK, ratio
    plain = plan_decode(*step)
    plan = plan_decode(*step, find_shared_splits(rows.table, lengths, BLOCK, ratio).to(device)) if shared else plain

    def run(plan: DecodePlan = plan) -> Tensor:
        out: Tensor = decode_attention(q, rows.keys, rows.values, *plan)
        return out

    def check() -> float:
        out, worst = run(), 0.0
        keys, values = rows.dense()
        for row in torch.linspace(0, count - 1, _CHECKED).long().tolist():
            k, v = (tensor[row].transpose(0, 1).float() for tensor in (keys, values))
            worst = max(worst, relative_error(out[row : row + 1], reference.attention(q[row : row + 1].float(), k, v)))
        return worst

    without: dict[str, Run] = {"batchmix without sharing": lambda: run(plain)}
    return Case(
        "shared-prefix decode attention" if shared else "decode attention",
        f"{count:,} rows of {context:,}" + (f", {shared:,} shared" if shared else ""),
        dtype_name(dtype), run, check, 3e-2,
        flops=4.0 * count * shape.heads * shape.head_dim * context,
        bytes=2 * q.nbytes + rows.bytes,
        peers=without if shared else _dense_peers(q[:, :, None], *rows.dense(), causal=False),
    )  # fmt: skip


def _dense_peers(q: Tensor, keys: Tensor, values: Tensor, causal: bool) -> dict[str, Run]:
    """What else there is for keys that lie dense. [B, H, t, C], [B, G, T, C] each."""

    def run() -> object:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=causal, enable_gqa=True)

    peers: dict[str, Run] = {"torch SDPA on a dense cache": run}
    if causal and q.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], q.shape[2], device=str(q.device))
        flex = torch.compile(flex_attention)
        peers["torch flex_attention on a dense cache"] = lambda: flex(q, keys, values, block_mask=mask, enable_gqa=True)
    if causal and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        dense = [tensor.transpose(1, 2) for tensor in (q, keys, values)]
        peers["flash_attn on a dense cache"] = lambda: flash_attn_func(*dense, causal=True)
    return peers
