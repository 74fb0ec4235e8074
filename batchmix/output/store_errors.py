"""What goes wrong with the output folder while a run writes to it, in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from batchmix.errors import BatchmixError
from batchmix.output.sink import NO_SPACE
from batchmix.storage import reason_of


@contextmanager
def output_errors_in_one_line(folder: str) -> Iterator[None]:
    """BatchmixError where the disk is full, the output folder was deleted, or its store does not answer any more."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise BatchmixError(
                f"output.dir={folder}: {error.strerror}; what was committed is safe, make room and run the command again"
            ) from None
        local = folder.removeprefix("file://")
        if "://" not in local:
            if not str(error.filename).startswith(os.path.join(local, "")) and error.filename != local:
                raise  # not of the output
            gone = not os.path.isdir(local)
            reason = "was deleted while the run wrote to it" if gone else f"{error.filename}: {error.strerror}"
        else:  # input has errors of its own, see `batchmix.input.data_file.reading`
            reason = f"the store fails ({reason_of(error)})"
        raise BatchmixError(f"output.dir={folder}: {reason}; what is committed there is whole, run the command again for the "
                            "rest") from None  # fmt: skip
