"""`.batchmix/run.json`: what an output folder holds the results of, so that a rerun with other settings is refused."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import subprocess
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import batchmix
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.input.prompt_columns import PromptColumns
from batchmix.redact import fingerprint
from batchmix.storage import Storage, create_json, find_json, read_json, reason_of, write_json
from batchmix.storage.bookkeeping import RUN, WEIGHTS
from batchmix.written_config import hidden_texts, identifying, same, to_plain

# What the columns are: 1 left `id` to data.id_column and kept a column `id` as `input_id`, and its logprobs had no texts; messages were
# JSON text where their objects had no common type.
_FIRST_COLUMNS, COLUMNS = 1, 2
_CONTEXT = 60  # characters that a message shows before the place where two long settings differ, and twice after it
_LIBRARIES = ("torch", "transformers", "triton", "pyarrow", "datasets", "mistral-common", "sentencepiece", "tokenizers",
              "llguidance", "numba")  # fmt: skip
_log = logging.getLogger(__name__)
# Keys on which no row's answer and no column depends. Paths are compared by what lies there, the fingerprints;
# data.limit by the rows that are there already.
_FREE = {"model.path", "model.revision", "model.format", "model.offload", "model.offload_dir", "data.path", "data.format",
         "data.split", "data.limit", "data.max_error_share", "data.on_error"}  # fmt: skip
_FIXED = {"output.format", "output.token_ids", "annotate.field", "annotate.choice", "annotate.regex", "annotate.json_schema",
          "annotate.swap_labels"}  # fmt: skip


def describe_run(
    config: Config,
    *,
    openai_model: str | None,
    model: str,
    tokenizer: str | None,
    data: Mapping[str, Any],
    dtype: str,
    quantization: str | None,
    max_model_len: int,
    id_column: str | None = None,
    columns: int = COLUMNS,
) -> dict[str, Any]:
    """All that goes into `run.json`. `identity` is what a rerun must share."""
    resolved = to_plain(config)
    identity = {
        key: value
        for key, value in flatten(to_plain(config, identifying))
        if (key.startswith(("model.", "data.", "sampling.")) and key not in _FREE) or key in _FIXED
    }
    identity |= {
        "model.dtype": dtype,
        "model.quantization": quantization,
        "model.max_model_len": max_model_len,
        "model": model,
        "tokenizer": tokenizer,
        "data": dict(data),
    } | ({} if columns == _FIRST_COLUMNS else {"columns": columns, "id_column": id_column})  # fmt: skip
    versions = {name: _version(name) for name in _LIBRARIES}
    return {
        "identity": identity,
        "config": resolved,
        "fingerprints": {key: fingerprint(text) for key, text in hidden_texts(config).items()},  # of what config hides
        "versions": {"batchmix": batchmix.__version__, "python": platform.python_version(), **versions},
        "git_revision": git_revision(),
        "openai_model": openai_model,  # in the responses; null where the output is no OpenAI batch
        "redone": [],
    }


def accept_run(storage: Storage, run: dict[str, Any], name: str = RUN) -> dict[str, Any]:
    """Write `run.json`, or compare with the one there: BatchmixError naming the keys that differ. Returns the file's.

    `name`: that of the output folder, or REDO_RUN.
    """
    if create_json(storage, name, run):
        return run
    old = read_run(storage, name)
    differing = differences(old["identity"], run["identity"])
    if differing:
        raise BatchmixError(
            f"output.dir={storage.url} holds rows made with other settings ({'; '.join(differing)}); choose another output.dir,"
            " or set output.overwrite=true to delete them and start afresh"
        )
    return old


def accept_weights(storage: Storage, fingerprint: str | None) -> None:
    """Write `weights.json`, or compare with the one there: BatchmixError where it is of other weights.

    `fingerprint`: of all tensors, as they were loaded; None for random weights, whose settings say what they are. To be
    called before the first part is committed.
    """
    said = {"xxh3_128": fingerprint}
    if fingerprint is None:
        return
    if not storage.exists(WEIGHTS) and storage.names("part-*"):
        _log.info("%s has rows of an earlier batchmix, which kept no checksum of the weights: they were compared by size"
                  " and by their files' ends alone", storage.url)  # fmt: skip
    if create_json(storage, WEIGHTS, said):
        return
    try:
        same = bool(read_json(storage, WEIGHTS) == said)
    except ValueError as error:
        raise BatchmixError(
            f"{storage.file_url(WEIGHTS)}: cannot be read ({error}); choose another output.dir"
        ) from None
    if not same:
        raise BatchmixError(
            f"output.dir={storage.url} holds rows made with other settings (model is another: the values of its weights"
            " differ); choose another output.dir, or set output.overwrite=true to delete them and start afresh"
        )


def messages_column(run: Mapping[str, Any]) -> str | None:
    """The input column of which the output has lists of structs; None where a template takes the place of messages."""
    data = run["config"]["data"]
    if run["identity"].get("columns") != COLUMNS or data.get("template") is not None:
        return None
    return PromptColumns.of(data).messages


def columns_of(storage: Storage) -> int:
    """Which columns a run there is to write: COLUMNS, but those of an earlier release where that began the folder."""
    stored = find_json(storage, RUN)
    identity = stored.get("identity") if isinstance(stored, dict) else None
    first = isinstance(identity, dict) and "columns" not in identity
    return _FIRST_COLUMNS if first else COLUMNS


def read_run(storage: Storage, name: str = RUN) -> dict[str, Any]:
    """What `run.json` says."""
    try:
        run: dict[str, Any] = read_json(storage, name)
        if not isinstance(run["identity"], dict) or not isinstance(run["redone"], list):
            raise ValueError("identity is no object or redone no list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BatchmixError(
            f"{storage.file_url(name)}: cannot be read ({reason_of(error)}); it is damaged or not a file of batchmix"
        ) from None
    return run


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key was old, is now new` for every key of the two identities that differs."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if same(before, now, named=key != "data"):
            continue
        if key in ("model", "tokenizer", "data"):
            found.append(f"{key} is another" if key != "data" else f"data: {_first_difference(before, now)}")
        else:
            was, is_now = _where_they_differ(*(json.dumps(value, ensure_ascii=False) for value in (before, now)))
            found.append(f"{key} was {was}, is now {is_now}")
    return found


def _where_they_differ(before: str, now: str) -> tuple[str, str]:
    """Both, of long ones what is around the first character that differs."""
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False)))
    start = max(0, alike - _CONTEXT)
    end = start + 3 * _CONTEXT

    def shown(text: str) -> str:
        return text if len(text) <= 3 * _CONTEXT else "..." * (start > 0) + text[start:end] + "..." * (end < len(text))

    return shown(before), shown(now)


def record_redo(storage: Storage, redo: dict[str, Any]) -> None:
    """Note in `run.json` that rows were replaced, and with which settings."""
    run = read_run(storage)
    run["redone"].append(redo)
    write_json(storage, RUN, run)


def flatten(config: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """`group.key`, value for every key."""
    for group, keys in config.items():
        for key, value in keys.items():
            yield f"{group}.{key}", value


def provenance(run: Mapping[str, Any]) -> dict[str, str]:
    """What the Arrow schema's metadata says of where the rows come from."""
    identity = run["identity"]
    template = identity.get("data.template") or ""
    template = (
        template if isinstance(template, str) else json.dumps(template)
    )  # of one from the environment, its fingerprint
    sampling = {key: value for key, value in identity.items() if key.startswith("sampling.")}
    return {
        "version": run["versions"]["batchmix"],
        "git_revision": run["git_revision"] or "",
        "model": run["config"]["model"]["path"],
        "model_sha256": identity["model"],
        "dtype": identity["model.dtype"],
        "quantization": identity["model.quantization"] or "",
        "kv_cache_dtype": identity["model.kv_cache_dtype"],
        "tokenizer_sha256": identity["tokenizer"] or "",
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "chat_template": identity["data.chat_template"],
        "sampling": json.dumps(sampling),
        "versions": json.dumps(run["versions"]),
        "device": run["config"]["engine"]["device"],
    }


def git_revision() -> str | None:
    """The commit of the checkout that batchmix runs from; None for an installed package."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        top = subprocess.run([*command[:-2], "rev-parse", "--show-toplevel"], capture_output=True, text=True, timeout=5)
        if top.returncode or Path(top.stdout.strip()).resolve() != folder.parent:
            return None
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_difference(before: Any, now: Any) -> str:
    old, new = (value.get("files", value) if isinstance(value, Mapping) else value for value in (before, now))
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{len(old)} files then, {len(new)} now"
        return next(f"{b['name']} has changed" for a, b in zip(old, new, strict=True) if not same(a, b, named=False))
    return "is another data set"
