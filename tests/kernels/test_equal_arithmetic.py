"""Kernels, loops and tiles whose results have to agree bit by bit compile to the same floating-point instructions.

A compiler may fuse a product and a sum in one of two places and not in the other, where a mask stands between them: the
results then differ in their last bits, and the interpreter does not show it. The PTX does, without a GPU.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import launches
import pytest
from ahead_of_time import Compiled, Compiler

ARCHES = ["sm_80", "sm_90"]


def cases(*functions: str, arches: list[str] = ARCHES) -> Iterator[object]:
    """The functions' calls on each GPU; the default run takes what it compiles anyway (test_compile.py)."""
    for name, call in launches.CALLS.items():
        for arch in arches:
            if name.split("-")[0] in functions and arch in call.arches:
                slow = () if call.quick and arch == "sm_90" else (pytest.mark.slow,)
                yield pytest.param(name, arch, id=f"{name}-{arch}", marks=slow)


def launched(kernels: list[Compiled], name: str) -> list[Compiled]:
    found = [kernel for kernel in kernels if kernel.kernel == name]
    assert found, f"{name} was not launched"
    return found


def fused(floats: dict[str, int]) -> int:
    """Multiply-adds of float32: as written in the kernel where the compiler may not fuse (.ftz: of its log2)."""
    return floats.get("fma.rn.f32", 0)


@pytest.mark.parametrize(("name", "arch"), list(cases("attention_decode")))
def test_a_shared_split_has_the_arithmetic_of_a_rows_own(compiler: Compiler, name: str, arch: str) -> None:
    kernels = compiler(name, arch)
    own, shared = (launched(kernels, f"decode_{kind}_kernel") for kind in ("split", "shared"))
    for one, other in zip(own, shared, strict=True):
        [own_loop], [shared_loop] = one.loops, other.loops
        times = shared_loop["ex2.approx.ftz.f32"] / own_loop["ex2.approx.ftz.f32"]  # as many pairs in a tile
        for instruction, count in own_loop.items():
            # Of 16 bits: keys and values are widened once for all pairs.
            as_many = {times * count} if instruction.endswith(".f32") else {count}
            if instruction[:3] in ("max", "add"):
                # Over the 4 warps that share the keys, for any number of pairs at once (Triton 3.6 and 3.7; 3.8: each).
                as_many.add(times * (count - math.log2(4)) + math.log2(4))
            assert shared_loop[instruction] in as_many, (instruction, one.meta, other.meta)
        assert shared_loop.keys() == own_loop.keys()
        assert not one.fp_fusion
        assert not other.fp_fusion
        assert fused(own_loop) > 0  # scores, scale and peak, fused as written
        assert fused(one.floats) == fused(own_loop), "fused outside of the loop over keys"
        assert fused(other.floats) == fused(shared_loop), "fused outside of the loop over keys"


@pytest.mark.parametrize(("name", "arch"), list(cases("attention_prefill")))
def test_masked_and_unmasked_tiles_of_a_prompt_have_the_same_arithmetic(
    compiler: Compiler, name: str, arch: str
) -> None:
    for kernel in launched(compiler(name, arch), "prefill_attention_kernel"):
        unmasked, masked = kernel.loops
        assert masked == unmasked, kernel.meta
        assert not kernel.fp_fusion
        assert fused(kernel.floats) == fused(masked) + fused(unmasked), "fused outside of the loops over keys"


@pytest.mark.parametrize(("name", "arch"), list(cases("norms")))
def test_a_norm_has_the_same_arithmetic_after_an_addition(compiler: Compiler, name: str, arch: str) -> None:
    kernels = compiler(name, arch)
    alone, added = (launched(kernels, name) for name in ("rms_norm_kernel", "add_rms_norm_kernel"))
    for one, other in zip(alone, added, strict=True):
        left, right = ({k: n for k, n in item.floats.items() if k.endswith(".f32")} for item in (one, other))
        if name.endswith("fp32"):
            right["add.f32"] -= left["fma.rn.f32"] + 1  # the residual's additions, one a value
        assert left == right, one.meta


@pytest.mark.parametrize(("name", "arch"), list(cases("sampling", "rotary", "rotary_fp8_cache")))
def test_kernels_with_optional_steps_leave_nothing_to_fuse(compiler: Compiler, name: str, arch: str) -> None:
    """A row is sampled with the same bits whether others have penalties or grammars, which compile a kernel of their own."""
    for kernel in compiler(name, arch):
        assert not kernel.fp_fusion, kernel.meta


FORMATS = ["fp16", "bf16", "fp8", "fp8_block", "int8", "int4"]


@pytest.mark.slow  # 8 kernels a format, 1 to 5 s each
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("format", FORMATS)
def test_tiles_of_every_size_have_the_same_arithmetic(compiler: Compiler, format: str, arch: str) -> None:
    """A value of the output takes the same instructions of float32 in each tile, in the loop and in the epilogue."""
    names = [name for name in launches.CALLS if name.startswith(f"moe-{format}-")]
    assert len(names) == len(launches.EXPERT_ROWS)
    if arch not in launches.CALLS[names[0]].arches:
        pytest.skip(f"no {format} on {arch}")
    found = defaultdict(dict)
    for name in names:
        for kernel in launched(compiler(name, arch), "_experts_kernel"):
            found[kernel.meta.split("UP=")[1].split()[0]][kernel.meta] = per_product(kernel)
    for tiles in found.values():
        assert len(tiles) > 1
        assert len({tuple(counts.items()) for counts in tiles.values()}) == 1, tiles


def per_product(kernel: Compiled) -> dict[str, float]:
    """Instructions of float32 for each product of two numbers.

    Not for each value of the tile: where it has fewer than the layout of mma.sync, several threads compute the same.
    """
    counts = {name: n for name, n in kernel.floats.items() if name.endswith(".f32") and "mma" not in name}
    return {name: n / counts["mul.f32"] for name, n in counts.items()}
