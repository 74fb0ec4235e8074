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
    dtype: Dtype = key(Dtype.auto, "type of weights and activations; auto: as the checkpoint was saved")
    quantization: Quantization | None = key(None, "format of the experts; null: as the checkpoint has them")
    kv_cache_dtype: KVCacheDtype = key(KVCacheDtype.auto, "format of the KV cache; auto: that of model.dtype")
    max_model_len: int | None = key(None, "most tokens of prompt and answer together; null: what the checkpoint allows")
    tensor_parallel_size: int = key(1, "GPUs that share one model, each with a slice of it")
    offload: OffloadMode = key(
        OffloadMode.auto, "experts that do not fit the GPU: auto streams them from host memory; never refuses the run"
    )
    offload_dir: str | None = key(None, "folder on a fast disk, for experts that do not fit host memory either")
    revision: str | None = key(None, "branch, tag or commit of a hub id")


@dataclass
class ConvertConfig:
    """What `batchmix convert` writes into output.dir."""

    format: ConvertFormat = key(
        ConvertFormat.hf,
        "hf: config.json, the hub's names; fused: the same with transformers 5's own names; mistral: params.json",
    )
    dtype: Dtype = key(Dtype.auto, "type to write; auto: every tensor as it is stored")
    max_shard_size: str = key(
        "5GB", "largest size of a file (GB: 10^9 bytes); format=mistral writes one file, as mistral_inference reads it"
    )
