"""Counter-based random numbers: the same key gives the same number, whatever ran before and on whatever device."""

from __future__ import annotations

import hashlib

from torch import Tensor

_MASK = 0xFFFFFFFF
# Constants of Philox4x32 with 10 rounds: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words per element. All tensors int64 of one shape, holding values below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product of two 32-bit numbers fits 64 bits; int64 wraps as uint64 does, and the mask drops the sign.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((high >> 32) & _MASK) ^ c1 ^ k0, ((low >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = high & _MASK, low & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: Tensor, row_key: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """One number in (0, 1) per element, float64 with 52 random bits, keyed by its four int64 arguments."""
    words = philox4x32(
        (row_key & _MASK, (row_key >> 32) & _MASK, sample & _MASK, position & _MASK),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    bits = (words[0] >> 6 << 26) | (words[1] >> 6)  # 26 + 26 bits: one more and the half would round up to 1
    return (bits.double() + 0.5) * 2.0**-52


def row_key(row_id: str) -> int:
    """A row's 64-bit key, from its id: so shuffling rows that carry an id does not change their answers."""
    return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "little", signed=True)
