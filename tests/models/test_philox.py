"""Counter-based random numbers: published vectors, range, independence."""

from __future__ import annotations

import pytest
import torch

from batchmix.models.philox import philox4x32, row_key, uniform

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(word.item() for word in words) == expected


def test_uniform_is_uniform_and_inside():
    position = torch.arange(200_000)
    numbers = uniform(*(torch.full_like(position, value) for value in (3, row_key("a"), 0)), position)
    assert numbers.dtype == torch.float64
    assert 0 < numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    counts = torch.histc(numbers, 100, 0, 1)
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_square < 149  # 99.9th percentile for 99 degrees of freedom


def test_every_part_of_the_key_counts():
    base = [7, row_key("x"), 1, 5]
    variants = [base, [8, *base[1:]], [7, row_key("y"), 1, 5], [7, base[1], 2, 5], [7, base[1], 1, 6], [-7, *base[1:]]]
    numbers = [uniform(*(torch.tensor([value]) for value in variant)).item() for variant in variants]
    assert len(set(numbers)) == len(variants)
    assert row_key("x") == row_key("x") != row_key("x ")
