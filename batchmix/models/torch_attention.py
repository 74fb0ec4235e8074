"""Attention over the paged cache in plain torch.

A row has the same result whatever other rows are in the batch: a prompt is padded to a length that depends on itself
alone, a decoding row is split at block boundaries, and the splits are summed as a fixed binary tree.

Legend: T packed tokens, B rows, H heads, G kv heads, R = H / G heads per kv head, C head dim, S block size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from batchmix.models.kv_cache import SCRATCH_BLOCK, KVCache
from batchmix.models.step_tokens import DecodeTokens, PrefillChunk

_LENGTH_TILE = 32  # prompts are padded to a multiple of it
_QUERY_TILE = 256  # queries of a later chunk that are scored at once
_GATHER_ITEMS = 4096  # blocks copied together at most when they are not dense in the cache
_DENSE_ENOUGH = 0.6  # share of the leading blocks in use from which they are read in place


class PrefillAttention:
    """Causal attention of packed prompt chunks, whose keys and values are in the cache already."""

    def __init__(self, cache: KVCache, chunks: Sequence[PrefillChunk]) -> None:
        self.cache = cache
        by_length: dict[int, list[PrefillChunk]] = defaultdict(list)
        for chunk in chunks:
            if chunk.start == 0:
                by_length[-(-chunk.length // _LENGTH_TILE) * _LENGTH_TILE].append(chunk)
        # Packed index of each padded place [B, padded], and for each real token its flat place and packed index.
        self.groups: list[tuple[Tensor, ...]] = []
        for padded, group in by_length.items():
            offsets = np.array([chunk.offset for chunk in group])[:, None]
            lengths = np.array([chunk.length for chunk in group])[:, None]
            column = np.arange(padded)
            gather = offsets + np.minimum(column, lengths - 1)  # past the end: the last token, whose result is dropped
            real = np.flatnonzero(column < lengths)
            self.groups.append(tuple(map(torch.from_numpy, (gather, real, gather.ravel()[real]))))
        self.later = [chunk for chunk in chunks if chunk.start > 0]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """q [T, H, C], k and v [T, G, C] of the step -> the chunks' tokens of out [T, H, C]."""
        # As stored, so that where a prompt is cut into chunks does not show.
        k, v = self.cache.as_stored(k), self.cache.as_stored(v)
        repeat = q.shape[1] // k.shape[1]
        for gather, real, packed in self.groups:
            queries = q[gather].transpose(1, 2)  # [B, H, padded, C]
            keys, values = k[gather].transpose(1, 2), v[gather].transpose(1, 2)  # [B, G, padded, C]
            # One call for each head of the groups: no copy of a group's keys for each of its heads.
            heads = [
                F.scaled_dot_product_attention(queries[:, head::repeat], keys, values, is_causal=True)
                for head in range(repeat)
            ]
            attended = torch.stack(heads, dim=2).flatten(1, 2)  # [B, H, padded, C]
            out[packed] = attended.transpose(1, 2).flatten(0, 1)[real]
        for chunk in self.later:
            span = slice(chunk.offset, chunk.offset + chunk.length)
            out[span] = self._attend_later(layer, q[span], chunk)

    def _attend_later(self, layer: int, q: Tensor, chunk: PrefillChunk) -> Tensor:
        """A chunk that is not its row's first: its keys come from the cache. q [t, H, C] -> [t, H, C]."""
        end = chunk.start + chunk.length
        blocks = torch.tensor(chunk.blocks[: -(-end // self.cache.block_size)])
        repeat = q.shape[1] // self.cache.keys.shape[2]
        keys, values = (
            self.cache.read(part, blocks, q.dtype).transpose(0, 1).flatten(1, 2).repeat_interleave(repeat, 0)
            for part in self.cache.layer(layer)
        )  # [H, blocks S, C]
        column, parts = torch.arange(keys.shape[1]), []
        for low in range(0, chunk.length, _QUERY_TILE):
            queries = q[low : low + _QUERY_TILE].transpose(0, 1)  # [H, t, C]
            visible = column <= chunk.start + low + torch.arange(queries.shape[1])[:, None]
            parts.append(F.scaled_dot_product_attention(queries[None], keys[None], values[None], attn_mask=visible)[0])
        return torch.cat(parts, 1).transpose(0, 1)


def visible_blocks(decode: DecodeTokens) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows that decode: their blocks int64 [B, W], and how many tokens each sees, the new one included, int64 [B].
    Rows that have ended see a token of the scratch block."""
    count = len(decode.host_positions)
    running = decode.running[:count].numpy()
    table = np.where(running[:, None], decode.host_blocks, SCRATCH_BLOCK).astype(np.int64)
    return table, decode.positions[:count].numpy() * running + 1


class DecodeAttention:
    """Attention of one new token per row over its paged context.

    Each block is one split, whose softmax is taken alone; then a row's blocks are merged by their log-sum-exp, as
    FlashDecoding does. So blocks are read where they lie, but where rows share them or few are in use.
    """

    def __init__(self, cache: KVCache, block_table: np.ndarray, context: np.ndarray) -> None:
        """See `visible_blocks`."""
        self.cache = cache
        size = cache.block_size
        self.num_rows = rows = len(context)
        num_blocks = -(-context // size)  # [B]
        width = 1 << int(num_blocks.max() - 1).bit_length()  # blocks per row, padded to a power of two
        row, place = np.nonzero(np.arange(width) < num_blocks[:, None])
        block = block_table[row, place]
        length = np.minimum(context[row] - place * size, size)
        last = int(block.max())
        used = np.zeros(last + 1, bool)
        used[block] = True
        self.in_place = len(block) >= _DENSE_ENOUGH * last and used.sum() == len(block) and not used[SCRATCH_BLOCK]
        if self.in_place:
            owner, valid, item = np.zeros(last, np.int64), np.full(last, size), block - 1
            owner[item], valid[item] = row, length
            self.blocks = torch.arange(1, last + 1)
        else:
            owner, valid, item = row, length, np.arange(len(block))
            self.blocks = torch.from_numpy(block)
        self.owner = torch.from_numpy(owner)  # [I] row of each item; an item is a block that is scored
        hidden = torch.from_numpy(np.arange(size) >= valid[:, None])
        self.bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]  # [I, 1, 1, S]
        items = np.full((rows, width), len(owner), np.int64)  # the last item stands for "no block"
        items[row, place] = item
        self.items = torch.from_numpy(items)  # [B, width]

    def __call__(self, layer: int, q: Tensor, out: Tensor) -> None:
        """q [T, H, C] of the step -> the rows' tokens, which are the first, of out [T, H, C]."""
        rows = self.num_rows
        heads, dim = q.shape[1:]
        kv_heads = self.cache.keys.shape[2]
        queries = (q[:rows] * dim**-0.5).view(rows, kv_heads, heads // kv_heads, dim)  # [B, G, R, C]
        keys, values = self.cache.layer(layer)
        num_items = len(self.owner)
        partial = queries.new_empty(num_items + 1, kv_heads, heads // kv_heads, dim)  # [I + 1, G, R, C]
        lse = torch.empty(partial.shape[:3], dtype=torch.float32)
        partial[-1], lse[-1] = 0, float("-inf")
        in_place = self.in_place and keys.dtype == q.dtype  # a copy widened from fp8 is made in parts
        step = num_items if in_place else _GATHER_ITEMS
        for low in range(0, num_items, step):
            high = min(low + step, num_items)
            where = slice(low + 1, high + 1) if self.in_place else self.blocks[low:high]
            seen = self.cache.read(keys, where, q.dtype)
            scores = torch.matmul(queries[self.owner[low:high]], seen.transpose(-1, -2)).float()
            scores += self.bias[low:high]
            peak = scores.amax(-1, keepdim=True)
            scores = scores.sub_(peak).exp_()
            total = scores.sum(-1, keepdim=True)  # [I, G, R, 1]
            seen = self.cache.read(values, where, q.dtype)
            partial[low:high] = torch.matmul((scores / total).to(q.dtype), seen)
            lse[low:high] = (peak + total.log())[..., 0]
        out[:rows] = self._merge(partial, lse).reshape(rows, heads, dim)

    def _merge(self, partial: Tensor, lse: Tensor) -> Tensor:
        """Sum each row's items, weighted by exp(lse), as a binary tree: items beyond the row's last add exact zeros."""
        lse = lse[self.items]  # [B, width, G, R]
        weight = (lse - lse.amax(1, keepdim=True)).exp()
        total = partial[self.items] * weight[..., None].to(partial.dtype)  # [B, width, G, R, C]
        while total.shape[1] > 1:
            total = total[:, 0::2] + total[:, 1::2]
            weight = weight[:, 0::2] + weight[:, 1::2]
        return (total / weight[..., None].to(total.dtype))[:, 0]
