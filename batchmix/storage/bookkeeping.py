"""What an output folder holds beside its parts lies in `output.dir/.batchmix/`, so that readers of data find the parts alone.

All its names are here, and that of the folder of Hydra's files, into which no reader looks either.
"""

from __future__ import annotations

FOLDER = ".batchmix"
HYDRA = ".hydra"

RUN = f"{FOLDER}/run.json"  # what the rows are made of: `batchmix/output/run_info.py`
WEIGHTS = f"{FOLDER}/weights.json"
SUCCESS = f"{FOLDER}/SUCCESS"  # all rows are there
FAILED = f"{FOLDER}/FAILED"  # all are there, and too many have an error
SUMMARY = f"{FOLDER}/summary.json"
METRICS = f"{FOLDER}/metrics.jsonl"
ALL_METRICS = f"{FOLDER}/metrics*.jsonl"
EVALUATION = f"{FOLDER}/evaluation.json"
CHECKS = f"{FOLDER}/checks.json"  # of an annotation's labels
REPORT_FOLDER = f"{FOLDER}/report"
REPORT = f"{REPORT_FOLDER}/report.html"
WORKERS = f"{FOLDER}/workers"  # folder: leases
CHECKSUMS = f"{FOLDER}/checksums"  # folder
REDO = f"{FOLDER}/redo"  # folder: parts of rows that are run again
REDO_RUN = f"{REDO}/_run.json"  # with the name that it has in folders of earlier releases
MERGE = f"{FOLDER}/merge"  # begins the names of folders: parts that are being put in order
JOURNAL = f"{FOLDER}/journal"  # begins the names of changes of many files
DONE = f"{FOLDER}/done"  # begins what a shard says when all its rows are committed
TRACE = f"{FOLDER}/trace"
LENGTHS = f"{FOLDER}/lengths.svg"  # of the prompts, by `batchmix plan`

FILES = (RUN, WEIGHTS, SUCCESS, FAILED, f"{FOLDER}/summary*.json", ALL_METRICS, EVALUATION, CHECKS,
         f"{TRACE}*.json", f"{DONE}-*", f"{JOURNAL}-*.json")  # fmt: skip
"""Patterns of all files that a run leaves, but for leases."""
FOLDERS = (REPORT_FOLDER, CHECKSUMS, REDO)


def done_name(index: int, count: int) -> str:
    return f"{DONE}-{index:05}-of-{count:05}"


def statistics_name(index: int, count: int) -> str:
    """Of what the last run of a shard did, for the summary."""
    return f"{FOLDER}/summary-{index:05}-of-{count:05}.json"


def metrics_name(shard: int) -> str:
    """Where a store knows no appending: a file for each shard."""
    return f"{FOLDER}/metrics-{shard:05}.jsonl"


def journal_name(generation: int) -> str:
    return f"{JOURNAL}-{generation:06}.json"


def merge_folder(generation: int) -> str:
    return f"{MERGE}-{generation:06}"


def trace_name(index: int, count: int) -> str:
    return f"{TRACE}-{index:05}-of-{count:05}.json" if count > 1 else f"{TRACE}.json"
