"""The CPU kernels, which numba compiles: what lies between the matrix products of a step.

A kernel gets a pointer to int64 numbers, `job`: sizes, addresses of dense tensors, and float32 numbers as their bits, in
the order in which it reads them. Each thread of torch's pool calls it and takes its share of the items. An item is computed
from its own data alone, in one order, so neither the other rows of a batch nor the number of threads change a bit.

Weights, activations and the KV cache are of the model's dtype: float32, or bfloat16 as its 16 bits. Sums are float32, and
what is written is rounded once. Nothing here may raise: there is no Python behind it (`numba_cache`).

Legend: T tokens, D hidden, F expert hidden, E experts, K experts of a token, H heads, G kv heads, R = H / G, C head dim,
S tokens of a KV block, W blocks of a row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (a compiled function has no types that mypy could see)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

from batchmix.models.numba_math import FUSED, SUM, exp, f32, float_of, i64, narrow, pointer, u32, widen

omp_get_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
omp_get_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


@njit(forceinline=True)
def share(count):
    """This thread's items: the first, and the one past the last."""
    thread, threads = i64(omp_get_thread_num()), i64(omp_get_num_threads())
    return count * thread // threads, count * (thread + 1) // threads


@njit(forceinline=True, fastmath=SUM)
def dot(x, x0, y, y0, width):
    """The product of x[x0 : x0 + width] and y[y0 : y0 + width]."""
    total = f32(0.0)
    for i in range(width):
        total += widen(x[x0 + i]) * widen(y[y0 + i])
    return total


@njit(forceinline=True, fastmath=FUSED)
def normalize(x, weight, out, start, width, eps):
    """out = x over its root mean square, times weight [width]; x and out from `start`."""
    scale = f32(1.0) / np.sqrt(dot(x, start, x, start, width) / f32(width) + eps)
    for i in range(width):
        out[start + i] = narrow(widen(x[start + i]) * scale * widen(weight[i]), weight[i])


@njit(forceinline=True, fastmath=SUM)
def exponentials(scores, start, count, peak):
    """scores -> e^(scores - peak), in place; their sum."""
    total = f32(0.0)
    for i in range(start, start + count):
        scores[i] = exp(scores[i] - peak)
        total += scores[i]
    return total


@njit(forceinline=True, fastmath=SUM)
def score(query, q0, keys, k0, scores, s0, count, width):
    """scores[s0 + s] = the product of the query and key s, of `count` keys [width]. Four at a time."""
    s = 0
    while s + 4 <= count:
        k = k0 + s * width
        a, b, c, d = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
        for i in range(width):
            q = query[q0 + i]
            a += q * widen(keys[k + i])
            b += q * widen(keys[k + width + i])
            c += q * widen(keys[k + 2 * width + i])
            d += q * widen(keys[k + 3 * width + i])
        scores[s0 + s], scores[s0 + s + 1], scores[s0 + s + 2], scores[s0 + s + 3] = a, b, c, d
        s += 4
    while s < count:
        scores[s0 + s] = dot(query, q0, keys, k0 + s * width, width)
        s += 1


@njit(forceinline=True, fastmath=FUSED)
def add_weighted(out, o, scores, first, values, v0, count, width):
    """out[o:] += sum over s < count of scores[first + s] * values[v0 + s * width:], [width]. Eight at a time."""
    s = 0
    while s + 8 <= count:
        p0, p1, p2, p3 = scores[first + s], scores[first + s + 1], scores[first + s + 2], scores[first + s + 3]
        p4, p5, p6, p7 = scores[first + s + 4], scores[first + s + 5], scores[first + s + 6], scores[first + s + 7]
        v = v0 + s * width
        for i in range(width):
            out[o + i] += (
                p0 * widen(values[v + i])
                + p1 * widen(values[v + width + i])
                + p2 * widen(values[v + 2 * width + i])
                + p3 * widen(values[v + 3 * width + i])
                + p4 * widen(values[v + 4 * width + i])
                + p5 * widen(values[v + 5 * width + i])
                + p6 * widen(values[v + 6 * width + i])
                + p7 * widen(values[v + 7 * width + i])
            )
        s += 8
    while s < count:
        p, v = scores[first + s], v0 + s * width
        for i in range(width):
            out[o + i] += p * widen(values[v + i])
        s += 1


def kernels(element: Any) -> list[Callable[[Any], None]]:
    """All kernels for a model of float32 or of uint16, the bits of bfloat16."""
    single, integer = types.float32, types.int64

    def rms_norm(job):
        """x [T, D], weight [D] -> out [T, D]"""
        tokens, width, eps = job[0], job[1], float_of(u32(job[2]))
        x, weight, out = pointer(job[3], element), pointer(job[4], element), pointer(job[5], element)
        first, last = share(tokens)
        for token in range(first, last):
            normalize(x, weight, out, token * width, width, eps)

    def add_rms_norm(job):
        """residual [T, D] += x [T, D]; its norm -> out [T, D]"""
        tokens, width, eps = job[0], job[1], float_of(u32(job[2]))
        residual, x = pointer(job[3], element), pointer(job[4], element)
        weight, out = pointer(job[5], element), pointer(job[6], element)
        first, last = share(tokens)
        for token in range(first, last):
            start = token * width
            for i in range(start, start + width):
                residual[i] = narrow(widen(residual[i]) + widen(x[i]), residual[i])
            normalize(residual, weight, out, start, width, eps)

    def rotate_and_cache(job):
        """Queries and keys of qkv [T, H + 2G, C] by their positions, in place; keys and values to their places in the cache."""
        tokens, heads, kv_heads, dim, size = job[0], job[1], job[2], job[3], job[4]
        qkv, keys, values = pointer(job[5], element), pointer(job[6], element), pointer(job[7], element)
        cos, sin = pointer(job[8], single), pointer(job[9], single)  # [max_model_len, C / 2]
        positions, blocks, offsets = pointer(job[10], integer), pointer(job[11], integer), pointer(job[12], integer)
        half = dim // 2
        first, last = share(tokens)
        for token in range(first, last):
            angle = positions[token] * half
            row = token * (heads + 2 * kv_heads) * dim
            for head in range(heads + kv_heads):
                a = row + head * dim
                b = a + half
                for i in range(half):
                    x, y = widen(qkv[a + i]), widen(qkv[b + i])
                    c, s = cos[angle + i], sin[angle + i]
                    qkv[a + i] = narrow(x * c - y * s, qkv[a + i])
                    qkv[b + i] = narrow(y * c + x * s, qkv[b + i])
            for g in range(kv_heads):
                place = ((blocks[token] * kv_heads + g) * size + offsets[token]) * dim
                k, v = row + (heads + g) * dim, row + (heads + kv_heads + g) * dim
                for i in range(dim):
                    keys[place + i] = qkv[k + i]
                for i in range(dim):
                    values[place + i] = qkv[v + i]

    def attend_splits(job):
        """Softmax of the queries of each split over the split's keys: unnormalised sums of values and what they were scaled by."""
        splits, heads, kv_heads, dim, size = job[0], job[1], job[2], job[3], job[4]
        qkv, keys, values = pointer(job[5], element), pointer(job[6], element), pointer(job[7], element)
        table, width = pointer(job[8], integer), job[9]  # [B, W]
        rows, starts, ends = pointer(job[10], integer), pointer(job[11], integer), pointer(job[12], integer)  # [splits]
        sums, scales = pointer(job[13], single), pointer(job[14], single)  # [splits, H, C], [splits, H, 2]: peak, total
        scratch, scale = pointer(job[15], single), float_of(u32(job[16]))  # [threads, R (C + S)]
        ratio = heads // kv_heads
        thread = i64(omp_get_thread_num())
        query = thread * ratio * (dim + size)
        scores = query + ratio * dim
        item = thread
        while item < splits * kv_heads:
            split, g = item // kv_heads, item % kv_heads
            row, base = rows[split], split * heads + g * ratio
            for i in range(ratio * dim):
                scratch[query + i] = widen(qkv[(row * (heads + 2 * kv_heads) + g * ratio) * dim + i]) * scale
                sums[base * dim + i] = f32(0.0)
            for r in range(ratio):
                scales[2 * (base + r)] = f32(-np.inf)
                scales[2 * (base + r) + 1] = f32(0.0)
            start = starts[split]
            while start < ends[split]:
                count = min(size, ends[split] - start)
                block = (table[row * width + start // size] * kv_heads + g) * size * dim
                for r in range(ratio):
                    score(scratch, query + r * dim, keys, block, scratch, scores + r * size, count, dim)
                for r in range(ratio):
                    own, at = scores + r * size, 2 * (base + r)
                    peak = scales[at]
                    for s in range(count):
                        peak = scratch[own + s] if scratch[own + s] > peak else peak
                    fade = exp(scales[at] - peak)
                    total = exponentials(scratch, own, count, peak)
                    scales[at] = peak
                    scales[at + 1] = scales[at + 1] * fade + total
                    out = (base + r) * dim
                    if start > starts[split]:
                        for i in range(dim):
                            sums[out + i] *= fade
                    add_weighted(sums, out, scratch, own, values, block, count, dim)
                start += size
            item += i64(omp_get_num_threads())

    def merge_splits(job):
        """Each row's splits, in their order -> out [B, H C]"""
        rows, heads, dim = job[0], job[1], job[2]
        firsts, sums, scales = pointer(job[3], integer), pointer(job[4], single), pointer(job[5], single)  # [B + 1]
        out = pointer(job[6], element)
        first, last = share(rows * heads)
        for item in range(first, last):
            row, head = item // heads, item % heads
            peak = f32(-np.inf)
            for split in range(firsts[row], firsts[row + 1]):
                scale = scales[2 * (split * heads + head)]
                peak = scale if scale > peak else peak
            total = f32(0.0)
            for split in range(firsts[row], firsts[row + 1]):
                at = split * heads + head
                fade = exp(scales[2 * at] - peak)
                total += fade * scales[2 * at + 1]
                scales[2 * at] = fade
            for i in range(dim):
                value = f32(0.0)
                for split in range(firsts[row], firsts[row + 1]):
                    at = split * heads + head
                    value += scales[2 * at] * sums[at * dim + i]
                out[item * dim + i] = narrow(value / total, out[item * dim + i])

    def sort_by_expert(job):
        """experts [T, K] -> counts [E]; the rows of each expert begin at a multiple of `tile`: tokens of rows, rows of [T, K].

        One thread runs it. Rows that no token has compute token 0.
        """
        pairs, top_k, num_experts, tile = job[0], job[1], job[2], job[3]
        experts, counts, ends = pointer(job[4], integer), pointer(job[5], integer), pointer(job[6], integer)
        token_of_row, row_of_pair = pointer(job[7], integer), pointer(job[8], integer)
        for expert in range(num_experts):
            counts[expert] = 0
        for pair in range(pairs):
            counts[experts[pair]] += 1
        start = 0
        for expert in range(num_experts):
            for row in range(start + counts[expert], start + (counts[expert] + tile - 1) // tile * tile):
                token_of_row[row] = 0
            ends[expert] = start
            start += (counts[expert] + tile - 1) // tile * tile
        for pair in range(pairs):
            row = ends[experts[pair]]
            ends[experts[pair]] = row + 1
            token_of_row[row] = pair // top_k
            row_of_pair[pair] = row
        for expert in range(num_experts):
            ends[expert] = (ends[expert] + tile - 1) // tile * tile

    def swiglu(job):
        """gate_up [P, 2F] -> silu(gate) * up, out [P, F]"""
        rows, width = job[0], job[1]
        gate_up, out = pointer(job[2], element), pointer(job[3], element)
        first, last = share(rows)
        for row in range(first, last):
            gates, ups = 2 * row * width, (2 * row + 1) * width
            for i in range(width):
                gate = widen(gate_up[gates + i])
                out[row * width + i] = narrow(gate / (f32(1.0) + exp(-gate)) * widen(gate_up[ups + i]), gate_up[gates])

    def combine(job):
        """residual [T, D] + the sum over k of weights [T, K] times rows of experts, in this order -> out [T, D]

        Of tokens from `valid` on the residual alone.
        """
        tokens, width, top_k, valid = job[0], job[1], job[2], job[3]
        rows, weights, row_of_pair = pointer(job[4], element), pointer(job[5], element), pointer(job[6], integer)
        residual, out = pointer(job[7], element), pointer(job[8], element)
        first, last = share(tokens)
        for token in range(first, last):
            start = token * width
            if token >= valid:
                for i in range(width):
                    out[start + i] = residual[start + i]
                continue
            for i in range(width):
                total = f32(0.0)
                for k in range(top_k):
                    pair = token * top_k + k
                    total += widen(weights[pair]) * widen(rows[row_of_pair[pair] * width + i])
                out[start + i] = narrow(widen(residual[start + i]) + total, residual[start + i])

    return [rms_norm, add_rms_norm, rotate_and_cache, attend_splits, merge_splits, sort_by_expert, swiglu, combine]
