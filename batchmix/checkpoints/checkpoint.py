"""Which checkpoint `model.path` names, what it is, and where its tensors lie. Reads no weights."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from batchmix.checkpoints.config import ModelConfig, ModelFormat, OffloadMode
from batchmix.checkpoints.prequantized import Packing, open_packing
from batchmix.checkpoints.sources import TensorFiles, first_line, in_line
from batchmix.dtypes import Dtype, KVCacheDtype, Quantization
from batchmix.errors import BatchmixError
from batchmix.json_file import read_object, shown
from batchmix.models.config_keys import CONFIG as CONFIG_KEYS
from batchmix.models.config_keys import GENERATION_CONFIG
from batchmix.models.config_keys import PARAMS as PARAMS_KEYS
from batchmix.models.mixtral_config import MixtralConfig, token_ids, window_of
from batchmix.models.quantized import check_shape

TINY = Path(__file__).parents[1] / "models" / "tiny"
CONFIG, PARAMS, INDEX = "config.json", "params.json", "model.safetensors.index.json"
SINGLE, ADAPTER = "model.safetensors", "adapter_config.json"
_HUB_SECONDS = 5  # that the hub may take to answer, for each of two tries
_SMALL_FILES = ["*.json", "tokenizer*", "*.jinja"]
_CONSOLIDATED = ("consolidated*.safetensors", "consolidated*.pth", "consolidated*.pt")
_FILE_NAME = re.compile(r"[^/\\\0-\x1f\ud800-\udfff]{1,200}\.safetensors")
_HEADER_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, described. `files` hold the weights, in the order in which they are read."""

    folder: Path
    format: ModelFormat  # hf, mistral or random, never auto
    config: MixtralConfig
    dtype: torch.dtype  # in which the engine runs
    max_model_len: int  # prompt + completion tokens
    eos_token_ids: tuple[int, ...]  # of the configuration; `end_tokens` has the tokenizer's too
    files: tuple[Path, ...]
    quantization: Quantization | None = None  # in which the experts are kept in memory; None: dtype
    packing: Packing | None = None  # how weights are kept in the files, where they are quantised there
    kv_cache_dtype: KVCacheDtype = KVCacheDtype.auto
    offload: OffloadMode = OffloadMode.auto
    offload_dir: str | None = None
    notes: tuple[str, ...] = ()  # what the folder says that has no effect: a line each, for the log
    generation_config: Mapping[str, Any] = field(default_factory=dict, compare=False)  # of LLM; a job does not use it

    def end_tokens(self, of_tokenizer: int | None) -> tuple[int, ...]:
        """The ids at which an answer ends, as in vLLM: the configuration's and the tokenizer's own.

        Those that the model has no row for are left out: it cannot say them.
        """
        ids = dict.fromkeys([*self.eos_token_ids, *(() if of_tokenizer is None else (of_tokenizer,))])
        return tuple(token for token in ids if 0 <= token < self.config.vocab_size)

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
    packing = None
    if form is ModelFormat.hf or not (folder / PARAMS).is_file():
        raw, keys = read_object(folder / CONFIG), CONFIG_KEYS
        config = MixtralConfig.from_hf(raw)
        saved = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        generation = _generation_config(folder)
        eos = token_ids(generation, "generation_config.json", "eos_token_id")
        if "eos_token_id" not in generation:
            eos = token_ids({"eos_token_id": 2, **raw}, CONFIG, "eos_token_id")
        packing = None if random else open_packing(raw, folder)
    else:
        raw, keys = read_object(folder / PARAMS), PARAMS_KEYS
        config = MixtralConfig.from_mistral(raw)
        saved, eos, generation = "", (2,), {}
    max_model_len = _max_model_len(model, config, window_of(raw, keys.file), keys.file)
    files = () if not weights else _hf_files(folder) if form is ModelFormat.hf else _mistral_files(folder)
    saved = saved or _stored_dtype(files)
    name = saved if model.dtype is Dtype.auto else model.dtype.value
    if not isinstance(name, str) or name not in DTYPES:
        raise BatchmixError(f"{folder}: dtype {shown(name)} is not one of {', '.join(DTYPES)}; set model.dtype")
    form = ModelFormat.random if random else form
    quantization = model.quantization or (packing.runs if packing is not None else None)
    check_shape(quantization, config)
    notes = [*keys.notes(raw), *GENERATION_CONFIG.notes(generation), *_notes(folder, files, eos, config.vocab_size)]
    return Checkpoint(
        folder, form, config, DTYPES[name], max_model_len, eos, files, quantization=quantization, packing=packing,
        kv_cache_dtype=model.kv_cache_dtype, offload=model.offload, offload_dir=model.offload_dir, notes=tuple(notes),
        generation_config=generation,
    )  # fmt: skip


def _max_model_len(model: ModelConfig, config: MixtralConfig, window: int | None, file: str) -> int:
    """Prompt + completion tokens. A sliding window is full attention as long as no row is longer."""
    limit = config.max_position_embeddings
    if model.max_model_len is not None and model.max_model_len > limit:
        raise BatchmixError(f"model.max_model_len={model.max_model_len}: the checkpoint allows at most {limit}")
    length = model.max_model_len or limit
    if window is not None and length > window:
        raise BatchmixError(
            f"{file}: sliding_window={window} is not supported for rows that are longer;"
            f" model.max_model_len={window} or less runs it, with the same answers"
        )
    return length


def _notes(folder: Path, files: tuple[Path, ...], eos: tuple[int, ...], vocab_size: int) -> list[str]:
    notes = []
    beyond = [token for token in eos if token >= vocab_size]
    if beyond:
        notes.append(f"{folder}: eos_token_id {shown(beyond)} is not in the model's vocabulary of {vocab_size} tokens")
    if [path.name for path in files] == [SINGLE] and (folder / INDEX).is_file():
        notes.append(f"{folder}: {SINGLE} is read, as in transformers; {INDEX} beside it is not")
    return notes


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
    the weights' files are called. With HF_HUB_OFFLINE=1, or where the hub does not answer, what the cache has."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unanswered = _unanswered(model)
    download = functools.partial(snapshot_download, model.path, local_files_only=unanswered is not None)
    try:
        folder = Path(download(revision=model.revision, allow_patterns=_SMALL_FILES))
        if weights:
            patterns = _weight_patterns(folder, _find_format(folder, model.format))
            commit = folder.name  # a branch can move meanwhile
            download(revision=commit, allow_patterns=patterns)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = unanswered or first_line(error)
        revision = f" at model.revision={model.revision}" if model.revision else ""
        raise BatchmixError(
            f"model.path={model.path}: neither a folder here nor to be had from the hub{revision} ({reason});"
            f" where there is no network, run `hf download {model.path}` where there is one and give the folder; a model that"
            " asks for consent needs HF_TOKEN"
        ) from None
    if unanswered is not None:
        _log.warning(
            "model.path=%s: the hub was not asked (%s); the copy in the local cache is used", model.path, unanswered
        )
    return folder


def _unanswered(model: ModelConfig) -> str | None:
    """Why the hub does not answer, or None where it does. `snapshot_download` would wait for minutes where a firewall drops
    what is sent."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        HfApi().model_info(model.path, revision=model.revision, timeout=_HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):  # the download says which
        return None
    except Exception as error:  # those of its HTTP client, whichever that is
        return first_line(error)
    return None


def _weight_patterns(folder: Path, form: ModelFormat) -> list[str]:
    if form is ModelFormat.mistral:
        return ["consolidated*"]
    return sorted({*_weight_map(folder).values(), SINGLE})  # both where both are there: the single file is read


def _find_format(folder: Path, wanted: ModelFormat) -> ModelFormat:
    if (folder / ADAPTER).is_file():
        base = read_object(folder / ADAPTER).get("base_model_name_or_path")
        raise BatchmixError(
            f"model.path={folder}: {ADAPTER} makes it a LoRA adapter{f' of {shown(base)}' if base else ''}; merge it into"
            " its base model and give the merged folder (peft: model.merge_and_unload().save_pretrained(folder))"
        )
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


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_object(path) if path.is_file() else {}


def _hf_files(folder: Path) -> tuple[Path, ...]:
    weight_map = {} if (folder / SINGLE).is_file() else _weight_map(folder)  # the order of transformers
    names = sorted(set(weight_map.values())) or [SINGLE]
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
            + (f" (tensor {in_line(lost[0])} is in it)" if lost else "")
        )
    return tuple(folder / name for name in names)


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index of a checkpoint in several files has it; empty where there is no index."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BatchmixError(f"{index}: has no weight_map, which says what tensor is in which file")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise BatchmixError(f"{index}: tensor {in_line(name)} is in {shown(file)}, which is no file name")
    return weight_map


def _stored_dtype(files: tuple[Path, ...]) -> str:
    """What the first file has, for params.json does not say it; Mistral's own are bfloat16."""
    found = TensorFiles(files[:1]).dtypes() if files else []
    return next((name for name, short in _HEADER_NAMES.items() if short in found), "bfloat16")


def check_index(folder: Path, files: TensorFiles) -> None:
    """BatchmixError where a file lacks a tensor that the index says is in it."""
    if (folder / SINGLE).is_file():
        return
    shapes = files.shapes()
    for name, file in _weight_map(folder).items():
        if name not in shapes or files.path(name).name != file:
            raise BatchmixError(f"{folder / file}: has no tensor {in_line(name)}, which {INDEX} says is in it")


def _mistral_files(folder: Path) -> tuple[Path, ...]:
    for pattern in _CONSOLIDATED:
        files = tuple(sorted(folder.glob(pattern)))
        if files:
            return files
    raise BatchmixError(f"{folder}: none of {', '.join(_CONSOLIDATED)} is there")
