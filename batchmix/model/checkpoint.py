"""Which checkpoint `model.path` names, what it is, and where its tensors lie. Reads no weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batchmix.config import Dtype, KVCacheDtype, ModelConfig, ModelFormat, Quantization
from batchmix.errors import BatchmixError
from batchmix.model.config import MixtralConfig
from batchmix.model.quantized import check_shape

TINY = Path(__file__).parent / "tiny"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
    quantization: Quantization | None = None  # in which the experts are kept; None: dtype
    kv_cache_dtype: KVCacheDtype = KVCacheDtype.auto

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
    if form is ModelFormat.hf:
        raw = _read_json(folder / "config.json")
        config = MixtralConfig.from_hf(raw)
        saved = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        eos = _hf_eos(folder, raw)
        files = _hf_files(folder) if weights else ()
    else:
        raw = _read_json(folder / "params.json")
        config = MixtralConfig.from_mistral(raw)
        saved, eos = "bfloat16", (2,)
        files = _mistral_files(folder) if weights else ()
    name = saved if model.dtype is Dtype.auto else model.dtype.value
    if name not in _DTYPES:
        raise BatchmixError(f"{folder}: dtype {name!r} is not one of {', '.join(_DTYPES)}; set model.dtype")
    limit = config.max_position_embeddings
    if model.max_model_len is not None and model.max_model_len > limit:
        raise BatchmixError(f"model.max_model_len={model.max_model_len}: the checkpoint allows at most {limit}")
    form = ModelFormat.random if random else form
    check_shape(model.quantization, config)
    return Checkpoint(
        folder, form, config, _DTYPES[name], model.max_model_len or limit, eos, files,
        quantization=model.quantization, kv_cache_dtype=model.kv_cache_dtype,
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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "tokenizer*", "*.jinja"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BatchmixError(
            f"model.path={model.path}: neither a folder here nor to be had from the hub ({reason})"
        ) from None


def _find_format(folder: Path, wanted: ModelFormat) -> ModelFormat:
    marks = {ModelFormat.hf: "config.json", ModelFormat.mistral: "params.json"}
    for form, name in marks.items():
        if wanted in (form, ModelFormat.auto) and (folder / name).is_file():
            return form
    names = marks.get(wanted, "neither config.json (hf) nor params.json (mistral)")
    raise BatchmixError(
        f"model.path={folder}: has {'no ' if wanted in marks else ''}{names}, so it is no Mixtral checkpoint"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BatchmixError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise BatchmixError(f"{path}: is no JSON object")
    return value


def _hf_eos(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    eos = (_read_json(generation) if generation.is_file() else {}).get("eos_token_id", raw.get("eos_token_id", 2))
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)


def _hf_files(folder: Path) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = tuple(folder / name for name in sorted(set(_read_json(index)["weight_map"].values())))
    else:
        files = (folder / "model.safetensors",)
    missing = [path.name for path in files if not path.is_file()]
    if missing and any(folder.glob("*.bin")):
        raise BatchmixError(f"{folder}: holds .bin weights, which can run code when loaded; save it again as safetensors "
                            "(transformers: model.save_pretrained(folder))")  # fmt: skip
    if missing:
        raise BatchmixError(
            f"{folder}: {missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else "")
        )
    return files


def _mistral_files(folder: Path) -> tuple[Path, ...]:
    for pattern in ("consolidated*.safetensors", "consolidated*.pth"):
        files = tuple(sorted(folder.glob(pattern)))
        if files:
            return files
    raise BatchmixError(f"{folder}: no consolidated*.safetensors and no consolidated*.pth beside params.json")
