"""Which checkpoint `model.path` names, what it is, and where its tensors lie. Reads no weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batchmix.config import Dtype, KVCacheDtype, ModelConfig, ModelFormat, Offload, Quantization
from batchmix.errors import BatchmixError
from batchmix.model.config import MixtralConfig
from batchmix.model.prequantized import Packing, open_packing
from batchmix.model.quantized import check_shape
from batchmix.model.sources import TensorFiles

TINY = Path(__file__).parent / "tiny"
CONFIG, PARAMS, INDEX = "config.json", "params.json", "model.safetensors.index.json"
_SMALL_FILES = ["*.json", "tokenizer*", "*.jinja"]
_CONSOLIDATED = ("consolidated*.safetensors", "consolidated*.pth", "consolidated*.pt")
_HEADER_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, described. `files` hold the weights, in the order in which they are read."""

    folder: Path
    format: ModelFormat  # hf, mistral or random, never auto
    config: MixtralConfig
    dtype: torch.dtype  # in which the engine runs
    max_model_len: int  # prompt + completion tokens
    eos_token_ids: tuple[int, ...]
    files: tuple[Path, ...]
    quantization: Quantization | None = None  # in which the experts are kept in memory; None: dtype
    packing: Packing | None = None  # how weights are kept in the files, where they are quantised there
    kv_cache_dtype: KVCacheDtype = KVCacheDtype.auto
    offload: Offload = Offload.auto
    offload_dir: str | None = None

    def num_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> str:
        """Sha256 over the configuration and each weight file's name, size and first and last 64 KiB."""
        digest = hashlib.sha256(repr((self.config, self.format.value, self.eos_token_ids)).encode())
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(65536))
                file.seek(max(0, size - 65536))
                digest.update(file.read(65536))
        return digest.hexdigest()


def open_checkpoint(model: ModelConfig, weights: bool = True) -> Checkpoint:
    """Find and describe the checkpoint; BatchmixError where it is not a Mixtral that we can run.

    Without `weights` they are neither downloaded nor missed: `files` is empty.
    """
    random = model.format is ModelFormat.random
    weights = weights and not random
    folder = _find_folder(model, weights)
    form = _find_format(folder, ModelFormat.hf if random else model.format)
    if form is ModelFormat.hf or not (folder / PARAMS).is_file():
        raw = read_json(folder / CONFIG)
        config = MixtralConfig.from_hf(raw)
        saved = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        eos = _hf_eos(folder, raw)
        packing = None if random else open_packing(raw, folder)
    else:
        packing = None
        config = MixtralConfig.from_mistral(read_json(folder / PARAMS))
        saved, eos = "", (2,)
    files = () if not weights else _hf_files(folder) if form is ModelFormat.hf else _mistral_files(folder)
    saved = saved or _stored_dtype(files)
    name = saved if model.dtype is Dtype.auto else model.dtype.value
    if name not in DTYPES:
        raise BatchmixError(f"{folder}: dtype {name!r} is not one of {', '.join(DTYPES)}; set model.dtype")
    limit = config.max_position_embeddings
    if model.max_model_len is not None and model.max_model_len > limit:
        raise BatchmixError(f"model.max_model_len={model.max_model_len}: the checkpoint allows at most {limit}")
    form = ModelFormat.random if random else form
    quantization = model.quantization or (packing.runs if packing is not None else None)
    check_shape(quantization, config)
    return Checkpoint(
        folder, form, config, DTYPES[name], model.max_model_len or limit, eos, files,
        quantization=quantization, packing=packing, kv_cache_dtype=model.kv_cache_dtype,
        offload=model.offload, offload_dir=model.offload_dir,
    )  # fmt: skip


def _find_folder(model: ModelConfig, weights: bool) -> Path:
    if model.path == "tiny":
        return TINY
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise BatchmixError(
            f"model.path={model.path}: is a file; give the folder that holds config.json or params.json"
        )
    if model.path.startswith(("/", ".", "~")) or model.path.count("/") != 1:
        raise BatchmixError(
            f"model.path={model.path}: no such folder (or give a hub id such as mistralai/Mixtral-8x7B-Instruct-v0.1)"
        )
    return _download(model, weights)


def _download(model: ModelConfig, weights: bool) -> Path:
    """The hub's snapshot of `model.revision` in the local cache: configuration and tokenizer first, which say what
    the weights' files are called. With HF_HUB_OFFLINE=1, or without a network, what the cache has."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model.path, revision=model.revision, allow_patterns=_SMALL_FILES))
        if weights:
            patterns = _weight_patterns(folder, _find_format(folder, model.format))
            commit = folder.name  # a branch can move meanwhile
            snapshot_download(model.path, revision=commit, allow_patterns=patterns)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        revision = f" at model.revision={model.revision}" if model.revision else ""
        raise BatchmixError(
            f"model.path={model.path}: neither a folder here nor to be had from the hub{revision} ({reason})"
        ) from None
    return folder


def _weight_patterns(folder: Path, form: ModelFormat) -> list[str]:
    if form is ModelFormat.mistral:
        return ["consolidated*"]
    return sorted(set(_weight_map(folder).values())) or ["model.safetensors"]


def _find_format(folder: Path, wanted: ModelFormat) -> ModelFormat:
    marks = {ModelFormat.hf: CONFIG, ModelFormat.mistral: PARAMS}
    for form, name in marks.items():
        if wanted in (form, ModelFormat.auto) and (folder / name).is_file():
            return form
    if wanted is ModelFormat.mistral and (folder / CONFIG).is_file():
        return wanted  # 8x7B on the hub: Mistral's files beside transformers', and config.json for both
    names = marks.get(wanted, "neither config.json (hf) nor params.json (mistral)")
    raise BatchmixError(
        f"model.path={folder}: has {'no ' if wanted in marks else ''}{names}, so it is no Mixtral checkpoint"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; BatchmixError where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BatchmixError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise BatchmixError(f"{path}: is no JSON object")
    return value


def _hf_eos(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    eos = (read_json(generation) if generation.is_file() else {}).get("eos_token_id", raw.get("eos_token_id", 2))
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)


def _hf_files(folder: Path) -> tuple[Path, ...]:
    weight_map = _weight_map(folder)
    names = sorted(set(weight_map.values())) or ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and any(folder.glob("*.bin")):
        raise BatchmixError(f"{folder}: holds .bin weights, which can run code when loaded; save it again as safetensors "
                            "(transformers: model.save_pretrained(folder))")  # fmt: skip
    if missing and any(path for pattern in _CONSOLIDATED for path in folder.glob(pattern)):
        raise BatchmixError(
            f"{folder}: {missing[0]} is missing; model.format=mistral reads the consolidated files there"
        )
    if missing:
        lost = [name for name, file in weight_map.items() if file == missing[0]]
        raise BatchmixError(
            f"{folder}: {missing[0]} is missing"
            + (f", and {len(missing) - 1} more" if missing[1:] else "")
            + (f" (tensor {lost[0]} is in it)" if lost else "")
        )
    return tuple(folder / name for name in names)


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index of a checkpoint in several files has it; empty where there is no index."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BatchmixError(f"{index}: has no weight_map, which says what tensor is in which file")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise BatchmixError(f"{index}: tensor {name} is in {file!r}, which is no file name")
    return weight_map


def _stored_dtype(files: tuple[Path, ...]) -> str:
    """What the first file has, for params.json does not say it; Mistral's own are bfloat16."""
    found = TensorFiles(files[:1]).dtypes() if files else []
    return next((name for name, short in _HEADER_NAMES.items() if short in found), "bfloat16")


def check_index(folder: Path, files: TensorFiles) -> None:
    """BatchmixError where a file lacks a tensor that the index says is in it."""
    shapes = files.shapes()
    for name, file in _weight_map(folder).items():
        if name not in shapes or files.path(name).name != file:
            raise BatchmixError(f"{folder / file}: has no tensor {name}, which {INDEX} says is in it")


def _mistral_files(folder: Path) -> tuple[Path, ...]:
    for pattern in _CONSOLIDATED:
        files = tuple(sorted(folder.glob(pattern)))
        if files:
            return files
    raise BatchmixError(f"{folder}: none of {', '.join(_CONSOLIDATED)} is there")
