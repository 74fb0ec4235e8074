"""The files that data.path stands for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import fsspec
import numpy as np

from batchmix.config import DataFormat
from batchmix.data.data_file import DataFile
from batchmix.data.formats import JSON_LINES, check_magic, guess_format, read_chunks
from batchmix.data.in_parallel import in_parallel
from batchmix.data.openai_batch import is_request
from batchmix.errors import BatchmixError
from batchmix.redact import name_of

_DETECTED_ROWS = 100  # of a JSON-lines file, until one can be read


def find_files(path: str, wanted: DataFormat) -> list[DataFile]:
    """The files that one entry of data.path stands for, sorted, checked to be of their formats."""
    try:
        filesystem, place = fsspec.core.url_to_fs(path)
        from_folder = False
        if filesystem.isfile(place):
            places = [place]
        elif from_folder := filesystem.isdir(place):
            places = [match for match in filesystem.find(place) if _is_data(match[len(place) :])]
        elif any(char in place for char in "*?["):
            places = [match for match in filesystem.glob(place) if not filesystem.isdir(match)]
        else:
            raise BatchmixError(f"data.path={path}: no such file or folder")
    except BatchmixError:
        raise
    except Exception as error:  # each storage backend has classes of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BatchmixError(f"data.path={path}: cannot be read ({reason})") from None
    remote = "://" in path
    files = []
    for match in sorted(places):
        name = name_of(str(filesystem.unstrip_protocol(match))).split("?")[0] if remote else name_of(match)
        name = name.encode("utf-8", "backslashreplace").decode()  # names that are not Unicode, too, go into messages
        form = guess_format(match) if wanted is DataFormat.auto else wanted
        if form is None:
            if from_folder and len(places) > 1:
                continue  # a folder's README and the like
            names = ", ".join(form.value for form in DataFormat if form is not DataFormat.auto)
            raise BatchmixError(f"{name}: its name does not say what it is; set data.format ({names})")
        files.append(DataFile(filesystem, match, name, form))
    if not files:
        raise BatchmixError(f"data.path={path}: no data files there")
    return in_parallel(partial(_check, wanted=wanted), files)


def _is_data(relative: str) -> bool:
    return not any(part.startswith(("_", ".")) for part in relative.strip("/").split("/"))


def _check(file: DataFile, wanted: DataFormat) -> DataFile:
    """The file, its bytes looked at. JSON lines are an OpenAI batch file if their first row is a batch request."""
    check_magic(file)
    if wanted is not DataFormat.auto or file.format not in JSON_LINES:
        return file
    for chunk in read_chunks(file, lambda start, stop: np.arange(start, stop) < _DETECTED_ROWS, limit=_DETECTED_ROWS):
        for record in chunk.records:
            if isinstance(record, dict):
                return replace(file, format=DataFormat.openai_batch) if is_request(record) else file
    return file
