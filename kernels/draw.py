"""What sampling does with the weights of one row: cut off the unlikely tokens, and draw one of the rest.

A weight is exp((logit - largest logit) / temperature), so the largest is 1. Sums of weights are sums of integers, each
weight cut to a multiple of 2^-44: they are exact, and the same for any order, tile or number of threads. A token of
less than 2^-44 times the most likely one's weight (6e-14) is never drawn; all others keep at least the 24 bits that a
float32 has where they are above 2^-20. Below 2^19 tokens no sum passes 63 bits.

Thresholds are found by bisection on the bits of the float32 weights, whose order is the weights' own: 30 passes over
a row, which stays in cache (128 KB), give the exact weight at which a count or a sum is reached, without a sort.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (a jitted function has no types that mypy could see)

from __future__ import annotations

import triton
import triton.language as tl

MAX_VOCABULARY = 2**19 - 1
_SCALE = tl.constexpr(2.0**44)
_BITS_OF_ONE = tl.constexpr(0x3F800000)


@triton.jit
def as_integer(weights):
    """Weights in [0, 1] in units of 2^-44, rounded down."""
    return (weights * _SCALE).to(tl.int64)


@triton.jit
def _load(weights_ptr, start, V, BLOCK: tl.constexpr):
    """The weights from `start` on, and their bits; beyond V a weight is 0 and its bits are below any threshold's."""
    columns = start + tl.arange(0, BLOCK)
    weights = tl.load(weights_ptr + columns, mask=columns < V, other=0.0)
    return weights, tl.where(columns < V, weights.to(tl.int32, bitcast=True), -1)


@triton.jit
def _highest(weights_ptr, V, wanted, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest threshold (bits of a float) that leaves `wanted` tokens, if COUNT, or a sum of weights of `wanted`.

    0 if even all of the tokens are not enough.
    """
    threshold = tl.zeros((), tl.int32)
    for place in range(30):  # bits of numbers up to 1 are below 2^30
        higher = threshold + (536870912 >> place)
        reached = tl.zeros((BLOCK,), tl.int32 if COUNT else tl.int64)
        for start in range(0, V, BLOCK):
            weights, bits = _load(weights_ptr, start, V, BLOCK)
            reached += tl.where(bits >= higher, 1 if COUNT else as_integer(weights), 0)
        threshold = tl.where(tl.sum(reached) >= wanted, higher, threshold)
    return threshold


@triton.jit
def threshold_of(weights_ptr, V, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """Bits of the weight below which tokens are dropped. Tokens that tie with the last one kept are kept.

    In this order: min-p drops what is less likely than min_p times the most likely token, top-k all but the k most
    likely, top-p all but the fewest of those left that have at least top_p of their sum.
    """
    least = tl.maximum(min_p, 0.0).to(tl.int32, bitcast=True)
    kth = tl.zeros((), tl.int32)
    if (top_k > 0) & (top_k < V):
        kth = _highest(weights_ptr, V, top_k, True, BLOCK)
    threshold = tl.maximum(least, kth)
    if top_p < 1:
        above, num_above = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int32)
        ties = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, V, BLOCK):
            weights, bits = _load(weights_ptr, start, V, BLOCK)
            amounts = as_integer(weights)
            above += tl.where(bits > threshold, amounts, 0)
            ties += tl.where(bits == threshold, amounts, 0)
            num_above += (bits > threshold).to(tl.int32)
        rest = tl.sum(ties)
        if (top_k > 0) & (kth >= least):  # of the tokens that tie for the last places of a top-k, as many as places
            places = (top_k - tl.sum(num_above)).to(tl.int64)
            rest = tl.minimum(rest, places * as_integer(kth.to(tl.float32, bitcast=True)))
        mass = (tl.sum(above) + rest).to(tl.float64)
        wanted = tl.math.ceil(top_p.to(tl.float64) * mass).to(tl.int64)
        nucleus = _highest(weights_ptr, V, wanted, False, BLOCK)
        threshold = tl.maximum(threshold, nucleus)
    return tl.minimum(threshold, _BITS_OF_ONE)


@triton.jit
def uniform_bits(seed, row_key, sample, position):
    """64 random bits: a uniform number in (0, 1) times 2^64, of which 52 bits are random and one makes it the middle
    of its interval. Philox4x32-10 (Salmon et al., SC 2011) with the counter and key of batchmix/models/philox.py.
    """
    low, high = (row_key & 0xFFFFFFFF).to(tl.uint32), ((row_key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    third, fourth = (sample & 0xFFFFFFFF).to(tl.uint32), (position & 0xFFFFFFFF).to(tl.uint32)
    first_word, second_word, _, _ = tl.philox(seed, low, high, third, fourth)
    return ((first_word >> 6).to(tl.uint64) << 38) | ((second_word >> 6).to(tl.uint64) << 12) | 2048


@triton.jit
def draw(weights_ptr, V, threshold, random_bits, BLOCK: tl.constexpr):
    """The first token at which the running sum of the weights kept passes a uniform number times their total."""
    kept = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        weights, bits = _load(weights_ptr, start, V, BLOCK)
        kept += tl.where(bits >= threshold, as_integer(weights), 0)
    target = tl.umulhi(random_bits, tl.sum(kept).to(tl.uint64)).to(
        tl.int64
    )  # below the total, as the number is below 1
    passed = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((), tl.int64)
    for start in range(0, V, BLOCK):
        weights, bits = _load(weights_ptr, start, V, BLOCK)
        amounts = tl.where(bits >= threshold, as_integer(weights), 0)
        passed += (before + tl.cumsum(amounts) <= target).to(tl.int32)
        before += tl.sum(amounts)
    return tl.sum(passed)
