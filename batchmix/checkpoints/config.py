"""The keys of `model` and `convert`: which checkpoint runs or is rewritten, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from batchmix.config_key import key
from batchmix.dtypes import Dtype, KVCacheDtype, Quantization


class ModelFormat(Enum):
    auto = "auto"
    hf = "hf"
    mistral = "mistral"
    random = "random"


class ConvertFormat(Enum):
    hf = "hf"
    fused = "fused"
    mistral = "mistral"


class OffloadMode(Enum):
    auto = "auto"
    never = "never"


@dataclass
class ModelConfig:
    """Which checkpoint runs, and in which precision."""

    path: str = key("tiny", "folder, hub id, or `tiny` for the model that ships with batchmix")
    format: ModelFormat = key(
        ModelFormat.auto,
        "hf: config.json + safetensors; mistral: params.json + consolidated; random: config.json alone, to measure with",
    )
    dtype: Dtype = key(Dtype.auto, "auto: as the checkpoint was saved")
    quantization: Quantization | None = key(None, "of the experts; null: as the checkpoint has them")
    kv_cache_dtype: KVCacheDtype = key(KVCacheDtype.auto, "auto: as dtype")
    max_model_len: int | None = key(None, "prompt + completion tokens; null: what the checkpoint allows")
    tensor_parallel_size: int = key(1, "processes, each on a GPU of its own, that share one model")
    offload: OffloadMode = key(
        OffloadMode.auto, "of experts that do not fit the GPU: auto streams them from host memory; never: out of memory"
    )
    offload_dir: str | None = key(None, "for experts that do not fit host memory either: a folder on a fast disk")
    revision: str | None = key(None, "of a hub id")


@dataclass
class ConvertConfig:
    """What `batchmix convert` writes into output.dir."""

    format: ConvertFormat = key(
        ConvertFormat.hf,
        "hf: config.json, the hub's names; fused: the same with transformers 5's own names; mistral: params.json",
    )
    dtype: Dtype = key(Dtype.auto, "auto: every tensor as it is stored")
    max_shard_size: str = key(
        "5GB", "of a file, GB: 10^9 bytes; format=mistral has one file, as mistral_inference reads it"
    )
