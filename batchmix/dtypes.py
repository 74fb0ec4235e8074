"""How numbers of a model may be stored."""

from __future__ import annotations

from enum import Enum


class Dtype(Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Quantization(Enum):
    fp8 = "fp8"
    int8 = "int8"
    int4 = "int4"


class KVCacheDtype(Enum):
    auto = "auto"
    fp8 = "fp8"


def dtype_name(dtype: object) -> str:
    """A torch dtype as configs and checkpoints have it: bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
