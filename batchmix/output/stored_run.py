"""The jobs on an output folder that need nothing but the folder: `batchmix status` and `batchmix finalize`."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.output.columns import OutputColumns
from batchmix.output.config import Order, OutputFormat
from batchmix.output.finalize import (
    close_lost,
    describe,
    finalize,
    finalizing,
    open_leases,
    read_markers,
    read_runs,
)
from batchmix.output.lease import Busy
from batchmix.output.part_formats import part_format
from batchmix.output.parts import Parts
from batchmix.output.run_info import read_run
from batchmix.output.status import Status
from batchmix.storage import reason_of
from batchmix.storage.bookkeeping import CHECKSUMS, RUN, SUCCESS, WORKERS
from batchmix.storage.layout import open_output


def open_stored(url: str) -> tuple[Parts, dict[str, Any]]:
    """The parts of a run, and what its `run.json` says. BatchmixError where there is none."""
    if not url:
        raise BatchmixError("output.dir=: give the folder of a run, for example output.dir=out")
    storage = open_output(url)
    try:
        begun = storage.exists(RUN)
    except OSError as error:
        raise BatchmixError(f"output.dir={url}: cannot be read ({reason_of(error)})") from None
    if not begun:
        raise BatchmixError(f"output.dir={url}: holds no {RUN}, so no run of batchmix has begun there")
    run = read_run(storage)
    try:
        output, form = run["config"]["output"], OutputFormat[run["config"]["output"]["format"]]
        Order[output["order"]], output["compression"], int(output["rows_per_shard"]), run["openai_model"]
    except (KeyError, TypeError, ValueError) as error:
        raise BatchmixError(
            f"{storage.file_url(RUN)}: is damaged: what it says of the output cannot be read ({error!r})"
        ) from None
    columns = OutputColumns(pa.schema([]), token_ids=False, logprobs=False)
    parts = Parts(storage, part_format(form, columns, output["compression"], run["openai_model"]))
    if names := parts.names():
        columns.schema = parts.schema(names[0]) or columns.schema
    return parts, run


def read_status(config: Config) -> Status:
    """How far the run in `output.dir` is. Reads only, so it may be called from anywhere at any time."""
    return Status.read(open_stored(config.output.dir)[0].unchecked())


def finalize_folder(config: Config) -> str:
    """Check that each row is there exactly once, put them in order if that was or is asked for, say that it is complete
    unless too many have an error.

    Returns what to print. BatchmixError where a worker is alive, or rows are missing.
    """
    parts, run = open_stored(config.output.dir)
    storage = parts.storage
    storage.make_folder(WORKERS)
    storage.make_folder(CHECKSUMS)
    with finalizing(storage, config.shard) as lease:
        for record in open_leases(storage):
            try:
                close_lost(parts, config.shard, record)
            except Busy:
                raise BatchmixError(f"output.dir={storage.url}: {record.owner} is writing {describe(record)} there; the last "
                                    "worker to finish does this by itself") from None  # fmt: skip
        markers = read_markers(storage)
        if not markers:
            raise BatchmixError(f"output.dir={storage.url}: no worker has read the data to its end yet; run the generate "
                                "command again")  # fmt: skip
        (_, count), last = max(markers.items(), key=lambda item: item[1].end)
        asked = {config.output.order, last.order, Order[run["config"]["output"]["order"]]}
        summary = finalize(
            parts,
            lease,
            order=Order.input if Order.input in asked else Order.completion,
            limit=last.limit,
            end=last.end,
            rows_per_shard=run["config"]["output"]["rows_per_shard"],
            runs=read_runs(storage, count),
            max_error_share=last.max_error_share,
        )
    written = f"{storage.file_url(SUCCESS)} is {'' if storage.exists(SUCCESS) else 'not '}written"
    return f"{summary.text()}\neach of {last.end:,} rows is there once; {written}"
