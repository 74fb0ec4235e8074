"""The files that data.path stands for."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import unquote

import fsspec
import numpy as np

from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig, DataFormat
from batchmix.input.data_file import DataFile
from batchmix.input.formats import JSON_LINES, bare_name, guess_format, identify, read_chunks
from batchmix.input.in_parallel import in_parallel
from batchmix.input.openai_batch import is_request
from batchmix.redact import name_of

_HEAD_BYTES = 64 << 10
_DETECTED_ROWS = 100  # of a JSON-lines file, until one can be read
_NAMED = 5  # files that a message names
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"

_log = logging.getLogger(__name__)


def find_files(paths: Sequence[str], data: DataConfig) -> list[DataFile]:
    """The files that the entries of data.path stand for, each entry's sorted, looked at and of known formats.

    Files without contents are left out with a line that names them; BatchmixError where all are.
    """
    found = [file for path in paths for file in _named_files(path, data)]
    files = in_parallel(partial(_identify, wanted=data.format), found)
    empty = [file.name for file, known in zip(found, files, strict=True) if known is None]
    if len(empty) == len(found):
        others = f", and so are the {len(empty) - 1:,} others" if len(empty) > 1 else ""
        raise BatchmixError(f"{empty[0]}: is empty{others}")
    if empty:
        _log.warning("left out, since they are empty: %s", _listed(empty))
    known = [file for file in files if file is not None]
    if data.format is not DataFormat.auto:
        return known
    detected = in_parallel(_detect_by_head, known)
    # The others one at a time: of each, lines of many MB are read.
    return [found or _detect(file) for file, found in zip(known, detected, strict=True)]


def _named_files(path: str, data: DataConfig) -> list[DataFile]:
    """The files that one entry of data.path stands for, by their names."""
    try:
        filesystem, place = fsspec.core.url_to_fs(path)
        base: str | None = None  # the folder below which names are not the user's own words
        if filesystem.isfile(place):
            places = [place]
        elif filesystem.isdir(place):
            base = _split_folder(filesystem, place, data.split)
            places = _saved_files(filesystem, base) or [
                match for match in filesystem.find(base) if _is_data(match[len(base) :])
            ]
        elif any(char in place for char in "*?["):
            base = place[: place.rfind("/", 0, min(map(place.index, set("*?[") & set(place)))) + 1]
            places = [match for match in filesystem.glob(place) if not filesystem.isdir(match)]
            places = [match for match in places if _is_data(match[len(base) :], place[len(base) :])]
        else:
            raise BatchmixError(f"data.path={path}: no such file or folder")
    except BatchmixError:
        raise
    except Exception as error:  # each storage backend has classes of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BatchmixError(f"data.path={path}: cannot be read ({reason})") from None
    if base is not None:
        places = _data_alone(places, path, data.format)
    if not places:
        raise BatchmixError(f"data.path={path}: no data files there")
    return [_data_file(filesystem, match, base, "://" in path, data) for match in sorted(places)]


def _split_folder(filesystem: Any, place: str, split: str) -> str:
    """The folder of one split, where `datasets` saved several; else the folder itself."""
    place = place.rstrip("/")
    listing = f"{place}/dataset_dict.json"
    if not filesystem.isfile(listing):
        return place
    splits = json.loads(filesystem.cat_file(listing)).get("splits", [])
    if split not in splits:
        raise BatchmixError(f"{listing}: has no split {split!r}; set data.split to one of {', '.join(splits)}")
    return f"{place}/{split}"


def _saved_files(filesystem: Any, place: str) -> list[str] | None:
    """The files of a data set that `datasets` saved here, as its state.json lists them; None where there is none."""
    if not (filesystem.isfile(f"{place}/state.json") and filesystem.isfile(f"{place}/dataset_info.json")):
        return None
    state = json.loads(filesystem.cat_file(f"{place}/state.json"))
    if not isinstance(state, dict) or not isinstance(state.get("_data_files"), list):
        return None
    return [f"{place}/{entry['filename']}" for entry in state["_data_files"]]


def _is_data(relative: str, pattern: str = "") -> bool:
    """Whether no part of the path is marked as none of the data, as `_SUCCESS` and `.part-0.csv.crc` are.

    A glob may ask for such names: a part of the pattern that begins so itself takes them.
    """
    asked = {part[0] for part in pattern.split("/") if part.startswith(("_", "."))}
    return not any(part[:1] in {"_", "."} - asked for part in relative.strip("/").split("/"))


def _data_alone(places: list[str], path: str, wanted: DataFormat) -> list[str]:
    """Of a folder's files those that are data by their names, or all where no name or data.format says so.

    `.json` and `.txt` are data only where there is no other format: beside others they are what describes them.
    """
    named = [place for place in places if guess_format(place) is not None]
    others = [place for place in named if not bare_name(place).endswith((".json", ".txt"))]
    if wanted is DataFormat.auto:
        data = others or named or places
    else:
        data = [place for place in places if not (others and bare_name(place).endswith((".json", ".txt")))]
    if len(data) < len(places):
        rest = sorted(set(places) - set(data))
        names = [place.encode("utf-8", "backslashreplace").decode() for place in rest]
        _log.info("data.path=%s: left out, since it is no data beside the other files: %s", path, _listed(names))
    return data


def _data_file(filesystem: Any, match: str, base: str | None, remote: bool, data: DataConfig) -> DataFile:
    name = name_of(str(filesystem.unstrip_protocol(match))).split("?")[0] if remote else name_of(match)
    name = name.encode("utf-8", "backslashreplace").decode()  # names that are not Unicode, too, go into messages
    named = guess_format(match) if data.format is DataFormat.auto else data.format
    tabs = bare_name(match).endswith(".tsv")
    delimiter = data.csv_delimiter or ("\t" if tabs else ",")
    partition = () if base is None else _partition(match[len(base) :])
    return DataFile(filesystem, match, name, named or DataFormat.auto, None,
                    "\t" if delimiter == "\\t" else delimiter, data.csv_encoding, partition)  # fmt: skip


def _partition(relative: str) -> tuple[tuple[str, str | None], ...]:
    """The columns that folders called name=value state, as Hive and Spark write them."""
    found = []
    for part in relative.strip("/").split("/")[:-1]:
        name, equals, value = part.partition("=")
        if name and equals:
            found.append((unquote(name), None if value == _NULL_PARTITION else unquote(value)))
    return tuple(found)


def _identify(file: DataFile, wanted: DataFormat) -> DataFile | None:
    named = None if file.format is DataFormat.auto else file.format
    return identify(file, named, certain=wanted is not DataFormat.auto)


def _detect_by_head(file: DataFile) -> DataFile | None:
    """As `_detect`, by the first few lines; None where none of them is short enough and can be read."""
    if file.format not in JSON_LINES:
        return file
    with file.open() as opened, file.reading():
        head = opened.read(_HEAD_BYTES)
    for line in head.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            return replace(file, format=DataFormat.openai_batch) if is_request(record) else file
    return None


def _detect(file: DataFile) -> DataFile:
    """JSON lines are an OpenAI batch file if their first row is a batch request."""
    for chunk in read_chunks(file, lambda start, stop: np.arange(start, stop) < _DETECTED_ROWS, limit=_DETECTED_ROWS):
        for record in chunk.records:
            if isinstance(record, dict):
                return replace(file, format=DataFormat.openai_batch) if is_request(record) else file
    return file


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
