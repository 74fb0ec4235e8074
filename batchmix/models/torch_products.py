"""Matrix products on the CPU whose rows keep their bits whatever other rows there are.

They are oneDNN's (MKL's, which torch takes for float32, cut a sum over threads when those outnumber the rows) and see
their rows in multiples of `ROW_TILE`. oneDNN still chooses by the number of rows how it cuts a sum: with AMX it does so
in bfloat16. So an engine asks `hold_bits` about the shapes of its weights when it starts, and products of the shapes
that are found to depend on the number of rows run in calls of `FIXED_ROWS` rows from then on. A shape may run in calls of
any size only where they give the bits of `FIXED_ROWS` rows. So the choice itself, which depends on the largest batch of
a run, shows in no answer.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
ROW_TILE = 16  # callers pad T to a multiple of it
FIXED_ROWS = 64  # per call where the number of rows shows; bfloat16 with AMX keeps about half its speed
_FIRST_TILES = (1, 2, 3, 5, 8)  # of decode steps and experts' shares; oneDNN's own tiles have 16, 32, 48 and 64 rows
_LARGE_ROWS = 2048  # what holds for them holds for more; only shapes that are cheap are tried with all the run has
_FLOPS = 5e8  # for each shape, beyond the first counts of rows

Shape = tuple[int, int, torch.dtype]  # out, in
_fixed: set[Shape] = set()  # of this process's weights, on this machine


def pad_rows(rows: int, tile: int = ROW_TILE) -> int:
    """`rows` rounded up to a multiple of `tile`."""
    return -(-rows // tile) * tile


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] with T a multiple of ROW_TILE, weight [out, in] -> [T, out]."""
    assert len(x) % ROW_TILE == 0, len(x)
    if (*weight.shape, weight.dtype) not in _fixed:
        return one_call(x, weight)
    padded = F.pad(x, (0, 0, 0, -len(x) % FIXED_ROWS))
    return torch.cat([one_call(part, weight) for part in torch.split(padded, FIXED_ROWS)])[: len(x)]


def one_call(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T by oneDNN where it can be had. In float32 twice as fast as MKL with AVX-512, 1.1 times with AVX2."""
    if weight.is_mkldnn or (x.dtype is torch.float32 and _onednn_keeps_bits()):
        return _onednn(x, weight)
    return F.linear(x, weight)


def prepack(weight: Tensor) -> Tensor:
    """weight [out, in] in oneDNN's own layout, for `product` alone: each call makes that anew of another, a tenth to a
    quarter of its time. As it is where oneDNN is not used, or has no such layout on this CPU."""
    return torch.ops.mkldnn._reorder_linear_weight(weight) if _packs(weight.dtype) else weight


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    if not _ONEDNN or dtype is torch.float16 or (dtype is torch.float32 and not _onednn_keeps_bits()):
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(ROW_TILE, ROW_TILE, dtype=dtype, device="cpu"))
    except RuntimeError:  # bfloat16 with AVX2 at most
        return False
    return True


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found


@functools.cache
def _onednn_keeps_bits() -> bool:
    """Whether torch has oneDNN, and one whose float32 products give a row the same bits whatever other rows are in the batch.

    That of torch 2.11 (3.10.2) does not with AVX2, nor with AVX-512 where a row has 512 values and more; that of 2.13 and
    2.14 (3.12.0) does.
    """
    if not _ONEDNN:
        return False
    source = torch.Generator().manual_seed(0)
    for width in (64, 1024):
        tile, weight = (torch.randn(rows, width, generator=source, device="cpu") for rows in (ROW_TILE, 96))
        alone = _onednn(tile, weight)
        for count in (2, 3, 4, 5, 7, 10, 32):
            if not torch.equal(_onednn(tile.repeat(count, 1), weight), alone.repeat(count, 1)):
                return False
    return True


def hold_bits(shapes: Mapping[str, tuple[Shape, int]], unpacked: Container[str] = ()) -> tuple[list[str], list[str]]:
    """Let each product keep its rows' bits: names of those that take calls of FIXED_ROWS, and of those that nothing holds.

    shapes: by name a weight's shape and the largest number of rows that it is multiplied with. unpacked: names of those
    that are multiplied as they are, not prepacked.
    """
    fixed: list[str] = []
    unsteady: list[str] = []
    for name, (shape, max_rows) in shapes.items():
        rows, weight = _revealing(shape)
        weight = weight if name in unpacked else prepack(weight)
        if shape not in _fixed and not _keeps_its_bits(rows, weight, max_rows):
            _fixed.add(shape)
        if shape in _fixed:
            (fixed if _keeps_its_bits(rows, weight, max_rows) else unsteady).append(name)
    return fixed, unsteady


def _keeps_its_bits(rows: Tensor, weight: Tensor, max_rows: int) -> bool:
    """Whether a row's product has the bits of a call of FIXED_ROWS, at any place among any number of rows up to `max_rows`."""
    expected = one_call(rows, weight)
    for number, count in enumerate(_row_counts((*weight.shape, weight.dtype), max_rows)):
        place = (torch.arange(count) + 7 * number) % FIXED_ROWS  # each row at another place than before
        if not torch.equal(product(rows[place], weight), expected[place]):
            return False
    return True


def _revealing(shape: Shape) -> tuple[Tensor, Tensor]:
    """FIXED_ROWS rows, and a weight of the shape, in whose product another order of the sum shows.

    Of two orders the sums in float32 differ by 1e-7, which 15 of 16 bfloat16 results and more round away. So every other
    row is such that its terms cancel: the exact sums are 0, and what is left is the rounding.
    """
    out, width, dtype = shape
    source = torch.Generator().manual_seed(0)
    order = torch.randperm(width, generator=source)
    first, second = order[: width // 2], order[width // 2 : width // 2 * 2]
    rows = torch.randn(FIXED_ROWS, width, generator=source)
    rows[::2, second] = rows[::2, first]
    weight = torch.randn(min(out, FIXED_ROWS), width, generator=source)
    weight[:, second] = -weight[:, first]
    repeats = -(-out // len(weight))
    return rows.to(dtype), weight.to(dtype).repeat(repeats, 1)[:out]


def _row_counts(shape: Shape, max_rows: int) -> Iterator[int]:
    """Numbers of rows to try: small ones, the largest, and others spread over all that lie between while they are cheap."""
    largest = pad_rows(max_rows) // ROW_TILE
    first = {min(tiles, largest) for tiles in (*_FIRST_TILES, _LARGE_ROWS // ROW_TILE)}
    yield from (ROW_TILE * tiles for tiles in sorted(first))
    left = _FLOPS / (2 * shape[0] * shape[1])
    spread = (1 + int(number * 0.618034 % 1 * size) for number in range(8) for size in (min(largest, 32), largest))
    for tiles in dict.fromkeys((largest, *spread)):
        left -= ROW_TILE * tiles
        if tiles not in first and left > 0:
            yield ROW_TILE * tiles
