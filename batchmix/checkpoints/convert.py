"""`batchmix convert`: a checkpoint of any layout into a new folder of another, one tensor at a time."""

from __future__ import annotations

import errno
import importlib.resources
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from batchmix.checkpoints.checkpoint import CONFIG, DTYPES, PARAMS, Checkpoint, open_checkpoint
from batchmix.checkpoints.compressed_tensors_format import quantization_config
from batchmix.checkpoints.config import ConvertConfig, ConvertFormat, ModelFormat
from batchmix.checkpoints.convert_quantized import QuantizedExperts
from batchmix.checkpoints.layouts import HubNames, Layout, Stored, from_hub, fused, hub, mistral
from batchmix.checkpoints.loading import open_tensors
from batchmix.checkpoints.prequantized import PackedTensors
from batchmix.checkpoints.safetensors_writer import Entry, write_safetensors, write_sharded
from batchmix.checkpoints.sources import TensorFiles
from batchmix.config import Config
from batchmix.dtypes import Dtype, Quantization, dtype_name
from batchmix.errors import BatchmixError
from batchmix.json_file import read_object
from batchmix.models.quantized import dense
from batchmix.observability.loading import LoadProgress
from batchmix.prompts.tokenizer import BUILT_IN
from batchmix.redact import redact
from batchmix.signals import StopSignals
from batchmix.storage import sync_folder

_LAYOUTS = {ConvertFormat.hf: hub, ConvertFormat.fused: fused, ConvertFormat.mistral: mistral}
_COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "tekken.json", "LICENSE*")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_log = logging.getLogger(__name__)


def convert(config: Config) -> None:
    """Write `output.dir`, whole or not at all; BatchmixError where it exists or the checkpoint cannot be converted."""
    target = Path(config.output.dir)
    if not config.output.dir:
        raise BatchmixError("output.dir: not given; it is the folder to write")
    if target.exists():
        raise BatchmixError(f"output.dir={target}: exists already; convert writes a new folder, so choose another name")
    if config.model.format is ModelFormat.random:
        raise BatchmixError("model.format=random: there are no weights to convert")
    if config.model.dtype is not Dtype.auto:
        raise BatchmixError(f"model.dtype={config.model.dtype.value}: convert.dtype says in what type to write")
    limit = _num_bytes(config.convert.max_shard_size)
    with StopSignals():
        started = time.perf_counter()
        checkpoint = open_checkpoint(config.model)
        source = open_tensors(checkpoint, TensorFiles(checkpoint.files))
        experts = _quantized_experts(checkpoint, config, source)
        entries = _entries(checkpoint, config.convert, source, experts)
        num_bytes = sum(entry.nbytes for entry in entries)
        with _appearing(target) as folder:
            _check_space(folder, num_bytes)
            elements = sum(math.prod(entry.shape) for entry in entries)
            with LoadProgress("converting", num_bytes, elements) as progress:
                if config.convert.format is ConvertFormat.mistral:
                    write_safetensors(folder / "consolidated.safetensors", entries, progress.count)
                else:
                    write_sharded(folder, entries, limit, progress.count)
            _write_config(checkpoint, config.convert, folder, None if experts is None else experts.format)
            _copy_tokenizer(checkpoint, folder)
            report = None if experts is None else experts.report(folder)
    if report is not None:
        print(report)
    seconds = time.perf_counter() - started
    print(f"{redact(str(target))}: {num_bytes / 1e9:.2f} GB in {seconds:.1f} s ({num_bytes / 1e9 / seconds:.2f} GB/s)")


def _quantized_experts(
    checkpoint: Checkpoint, config: Config, source: HubNames | PackedTensors
) -> QuantizedExperts | None:
    """Where the experts are to be written quantised: asked for, or they are and no other dtype is asked for."""
    format = checkpoint.quantization
    if format is None or (config.model.quantization is None and config.convert.dtype is not Dtype.auto):
        return None
    if config.convert.format is not ConvertFormat.hf:
        raise BatchmixError(
            f"convert.format={config.convert.format.value}: experts in {format.value} are written as hf only;"
            " convert.dtype=bfloat16 writes their values"
        )
    return QuantizedExperts(source, format, checkpoint.dtype)


def _entries(
    checkpoint: Checkpoint, config: ConvertConfig, source: HubNames | PackedTensors, experts: QuantizedExperts | None
) -> list[Entry]:
    """What is written, in the order of the network. Weights are read when an entry's turn comes."""
    shape = checkpoint.config
    tied = shape.tie_word_embeddings and config.format is ConvertFormat.mistral  # which has no word for it
    layout: Layout = _LAYOUTS[config.format](replace(shape, tie_word_embeddings=False) if tied else shape)
    given = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}

    def dtype(stored: Stored) -> torch.dtype:
        first = stored.parts[0]
        kept = source.dtype(given.get(first, first)) or checkpoint.dtype
        return kept if config.dtype is Dtype.auto else DTYPES[config.dtype.value]

    def pieces(stored: Stored) -> Callable[[], Iterable[Tensor]]:
        names = [given.get(part, part) for part in stored.parts]
        return lambda: _read(source, names, stored, shape.head_dim)

    entries = []
    for name, stored in layout.items():
        if experts is not None and ".experts." in name:
            entries += experts.entries(name, stored.shape)
        else:
            entries.append(Entry(name, stored.shape, dtype(stored), pieces(stored)))
    return entries


def _read(source: HubNames | PackedTensors, names: list[str], stored: Stored, head_dim: int) -> Iterator[Tensor]:
    for name in names:
        tensor = from_hub(dense(source.read(name), torch.float32), stored.form, head_dim)
        yield tensor.flatten(0, -2) if tensor.ndim > 2 else tensor
        source.release(name)


def _write_config(
    checkpoint: Checkpoint, config: ConvertConfig, folder: Path, quantization: Quantization | None
) -> None:
    """config.json or params.json; a file of the same kind is kept but for what changes."""
    params, hf = checkpoint.folder / PARAMS, checkpoint.folder / CONFIG
    if config.format is ConvertFormat.mistral:
        kept = checkpoint.format is ModelFormat.mistral and params.is_file()
        _write_json(folder / PARAMS, read_object(params) if kept else checkpoint.config.to_mistral())
        if checkpoint.eos_token_ids != (2,):
            _log.warning(
                "params.json has no place for eos_token_id=%s; answers will end at 2", checkpoint.eos_token_ids
            )
        return
    if checkpoint.format is ModelFormat.hf or not params.is_file():
        values = read_object(hf)
    else:
        values = checkpoint.config.to_hf() | {"bos_token_id": 1, "eos_token_id": 2, "sliding_window": None}
    for key in ("torch_dtype", "quantization_config", "compression_config"):
        values.pop(key, None)
    if quantization is not None:
        values["quantization_config"] = quantization_config(quantization)
    dtype = checkpoint.dtype if config.dtype is Dtype.auto else DTYPES[config.dtype.value]
    _write_json(folder / CONFIG, values | {"dtype": dtype_name(dtype)})
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer and licence files as they are: the readers of all layouts take the same ones."""
    for pattern in _COPIED:
        for path in checkpoint.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    config = checkpoint.folder / CONFIG
    if not (folder / CONFIG).is_file() and config.is_file():
        built_in = BUILT_IN.get(read_object(config).get("batchmix_tokenizer", ""))  # a file that mistral-common brings
        if built_in is not None:
            data = importlib.resources.files("mistral_common") / "data" / built_in
            (folder / built_in).write_bytes(data.read_bytes())


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it at the end of the block, or goes if that fails."""
    folder = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise BatchmixError(f"output.dir={target}: cannot be written ({reason})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise BatchmixError(
            f"output.dir: {num_bytes / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free there"
        )


def _num_bytes(text: str) -> int:
    """`5GB` and the like, powers of ten as in transformers."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(|KB|MB|GB|TB)", text.strip(), re.IGNORECASE)
    number = float(match[1]) * _UNITS[match[2].upper()] if match else 0
    if number < 1:
        raise BatchmixError(f"convert.max_shard_size={text}: must be a size such as 5GB or 500MB")
    return int(number)
