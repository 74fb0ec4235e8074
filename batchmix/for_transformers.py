"""The Triton kernels for users of transformers: `import batchmix.for_transformers`, then load a Mixtral with

    AutoModelForCausalLM.from_pretrained(path, experts_implementation="batchmix", attn_implementation="batchmix")

Either of the two works alone. They compute the forward pass; a backward pass through them is an error. Attention reads
transformers' dense cache where it lies: each kv head of each row is a paged row of its own, whose block table counts up.

Legend: B rows, T tokens of a row, E experts, K top-k, D hidden, F expert hidden, H heads, G kv heads, C head dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import causal_mask_function

from batchmix.kernels.attention_decode import DecodePlan, decode_attention, plan_decode
from batchmix.kernels.attention_prefill import PrefillPlan, plan_prefill, prefill_attention
from batchmix.kernels.gpu import current_gpu
from batchmix.kernels.moe import combine, experts_down, experts_up
from batchmix.kernels.routing import sort_pairs

NAME = "batchmix"
_BLOCK = 64  # tokens per block where rows begin and end at multiples of it, else 1


def _on_device_of_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which is another one than the tensors' with device_map="auto"."""

    @functools.wraps(function)
    def wrapper(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            return function(module, x, *args, **kwargs)

    return wrapper


@_on_device_of_first
def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a layer. hidden_states [T, D], top_k_index int64 and top_k_weights [T, K] -> [T, D].

    `module` holds gate_up_proj [E, 2F, D] (gate, then up) and down_proj [E, D, F], as MixtralExperts does.
    """
    experts: Any = module
    plain = (
        experts.has_gate
        and experts.is_concatenated
        and not experts.is_transposed
        and not experts.has_bias
        and not getattr(experts, "has_post_expert_norm", False)
        and getattr(experts.config, "hidden_act", None) == "silu"
        and type(experts)._apply_gate.__module__ == ExpertsInterface.__module__  # not replaced by the model
    )
    if not plain:
        raise ValueError(f'experts_implementation="{NAME}" is for SwiGLU experts like Mixtral\'s, not {type(module)}')
    if getattr(experts, "_is_expert_parallel", False):
        raise ValueError(f'experts_implementation="{NAME}" does not share experts between GPUs')
    _check_device(hidden_states)
    dtype, top_k = hidden_states.dtype, top_k_index.shape[1]
    order, offsets = sort_pairs.op(top_k_index.int(), len(experts.gate_up_proj), None, None)
    hidden_states = hidden_states.contiguous()
    h = experts_up.op(hidden_states, None, experts.gate_up_proj, None, order, offsets, top_k, dtype)
    weights = top_k_weights.float().reshape(-1)
    y = experts_down.op(h, None, experts.down_proj, None, order, offsets, weights, dtype)
    combined: Tensor = combine.op(y, top_k)
    return combined


@dataclass(eq=False)
class RowSpans:
    """What attention needs of a padding mask: made once per forward pass, passed to every layer as its mask."""

    spans: list[tuple[int, int]]  # of each row, where its tokens begin and end among the keys; the rest is padding
    first_query: int  # place of the first query among the keys
    num_queries: int
    num_keys: int
    _plans: dict[tuple[Any, ...], tuple[PrefillPlan | DecodePlan, int]] = field(default_factory=dict)

    def plan(
        self, kv_heads: int, ratio: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[PrefillPlan | DecodePlan, int]:
        """How the kernels go over B * G paged rows of `ratio` heads each, and the block size that fits them all."""
        key = (kv_heads, ratio, dtype, device)
        if key not in self._plans:
            fits = self.num_keys % _BLOCK == 0 and all(begin % _BLOCK == 0 for begin, _ in self.spans)
            block = _BLOCK if fits else 1
            kind = self._decode if self.num_queries == 1 else self._prefill
            self._plans[key] = kind(block, *key), block
        return self._plans[key]

    def _decode(self, block: int, kv_heads: int, ratio: int, _: torch.dtype, device: torch.device) -> DecodePlan:
        blocks = self.num_keys // block
        firsts, context = [], []
        for row, (begin, end) in enumerate(self.spans):
            seen = end - begin if end > self.first_query else 0  # 0 for a row whose newest token is padding: zeros
            for head in range(row * kv_heads, (row + 1) * kv_heads):
                firsts.append(head * blocks + begin // block)
                context.append(seen)
        table = _count_up(firsts, blocks, device)
        return plan_decode(table, torch.tensor(context, dtype=torch.int32, device=device), block, ratio)

    def _prefill(self, block: int, kv_heads: int, ratio: int, dtype: torch.dtype, device: torch.device) -> PrefillPlan:
        blocks = self.num_keys // block
        firsts, chunks = [], []
        for row, (begin, end) in enumerate(self.spans):
            query = max(begin, self.first_query)
            for head in range(row * kv_heads, (row + 1) * kv_heads):
                if query < end:  # padding is in no chunk: zeros
                    chunks.append((head * self.num_queries + query - self.first_query, query - begin, end - query))
                    firsts.append(head * blocks + begin // block)
        total = len(self.spans) * kv_heads * self.num_queries
        return plan_prefill(chunks, _count_up(firsts, blocks, device), total, ratio, dtype)


def _count_up(firsts: list[int], blocks: int, device: torch.device) -> Tensor:
    """A block table whose rows begin at `firsts`. What it says past a row's end is never read."""
    first = torch.tensor(firsts, dtype=torch.int32, device=device)
    return first[:, None] + torch.arange(blocks, dtype=torch.int32, device=device)


def row_spans(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> RowSpans:
    """The mask that `attention_forward` takes. attention_mask, bool [B, kv_length]: False for padding at either end."""
    if mask_function is not causal_mask_function:
        raise ValueError(f'attn_implementation="{NAME}" is causal attention without sliding windows or packed rows')
    if isinstance(q_offset, Tensor) or kv_offset or kv_length != q_offset + q_length:
        raise ValueError(f'attn_implementation="{NAME}" needs a cache that grows: cache_implementation="dynamic"')
    spans = [(0, kv_length)] * batch_size
    if attention_mask is not None:
        if attention_mask.shape != (batch_size, kv_length):
            raise ValueError(
                f"a padding mask of {list(attention_mask.shape)}, but {batch_size} rows of {kv_length} tokens"
            )
        mask = attention_mask.to(torch.uint8)
        begin = mask.argmax(1)
        count = mask.sum(1)
        end = torch.where(count > 0, mask.shape[1] - mask.flip(1).argmax(1), begin)
        rows = torch.stack((begin, end, count), 1).tolist()  # the one synchronisation of a forward pass
        if any(end - begin != count for begin, end, count in rows):
            raise ValueError(f'attn_implementation="{NAME}" takes padding before and after a row, not inside it')
        spans = [(begin, end) for begin, end, _ in rows]
    return RowSpans(spans, q_offset, q_length, kv_length)


@_on_device_of_first
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RowSpans,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention. query [B, H, T, C], key and value [B, G, keys, C] -> [B, T, H, C]; zeros for padding."""
    rows, heads, num_queries, dim = query.shape
    kv_heads = key.shape[1]
    if not isinstance(attention_mask, RowSpans):
        raise ValueError(f'attn_implementation="{NAME}" makes its own mask of a padding mask [rows, tokens]')
    if scaling is not None and not math.isclose(scaling, dim**-0.5):
        raise ValueError(f'attn_implementation="{NAME}" scales scores by head_dim**-0.5, not by {scaling}')
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or dropout:
        raise ValueError(f'attn_implementation="{NAME}" has no {", ".join([*unknown, *["dropout"] * (dropout > 0)])}')
    _check_device(query)
    plan, block = attention_mask.plan(kv_heads, heads // kv_heads, query.dtype, query.device)
    packed = query.reshape(rows * kv_heads, heads // kv_heads, num_queries, dim).transpose(1, 2).flatten(0, 1)
    keys, values = (cache.contiguous().view(-1, 1, block, dim) for cache in (key, value))
    out: Tensor
    if isinstance(plan, DecodePlan):
        out = decode_attention(packed, keys, values, *plan)
    else:
        out = prefill_attention(packed, keys, values, *plan)
    grouped = out.view(rows, kv_heads, num_queries, heads // kv_heads, dim)
    return grouped.transpose(1, 2).reshape(rows, num_queries, heads, dim), None


def _check_device(x: Tensor) -> None:
    if current_gpu(x.device).arch == "cpu" and x.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly: load the model with dtype=torch.float32")


ExpertsInterface.register(NAME, experts_forward)
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, row_spans)
