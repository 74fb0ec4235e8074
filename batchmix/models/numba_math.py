"""What the CPU kernels are written in, beside numba: pointers, float32 as bits and as bfloat16, e^x.

As numba_kernels.py, this is compiled without types that mypy could see.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

f32, i32, u32, i64 = np.float32, np.int32, np.uint32, np.int64
SUM = {"reassoc", "contract", "nsz"}  # a sum has as many parts as the CPU's vectors have numbers
FUSED = {"contract"}


@intrinsic
def pointer(typing: Any, address: Any, element: Any) -> Any:
    """The address as a pointer to numbers of a type."""
    to = types.CPointer(element.dtype)

    def cast(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(to))

    return to(address, element), cast


@intrinsic
def float_of(typing: Any, bits: Any) -> Any:
    """The float32 of 32 bits."""

    def cast(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), cast


@intrinsic
def widen(typing: Any, value: Any) -> Any:
    """A number of the model as float32."""

    def cast(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if value != types.uint16:
            return args[0]
        bits = builder.zext(args[0], context.get_value_type(types.uint32))
        return builder.bitcast(builder.shl(bits, bits.type(16)), context.get_value_type(types.float32))

    return types.float32(value), cast


@intrinsic
def narrow(typing: Any, value: Any, like: Any) -> Any:
    """A float32 as a number of the model, which `like` is; rounded to nearest even."""

    def cast(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like != types.uint16:
            return args[0]
        word, half = context.get_value_type(types.uint32), context.get_value_type(types.uint16)
        bits = builder.bitcast(args[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.lshr(builder.add(builder.add(bits, word(0x7FFF)), odd), word(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.select(is_nan, half(0x7FC0), builder.trunc(rounded, half))

    return like(value, like), cast


@njit(forceinline=True, fastmath=FUSED)
def exp(x):
    """e^x in float32, to 2 units of the last place between -87 and 88, which it stays within: Cephes' expf."""
    x = f32(88.0) if x > f32(88.0) else x  # NaN stays
    x = f32(-87.0) if x < f32(-87.0) else x
    n = np.floor(x * f32(1.44269504) + f32(0.5))
    r = x - n * f32(0.693359375) - n * f32(-2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return (p * r * r + r + f32(1.0)) * float_of(u32((i32(n) + i32(127)) << i32(23)))
