"""The keys of `output`: where the answers go."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from batchmix.config_key import key


class OutputFormat(Enum):
    arrow = "arrow"
    parquet = "parquet"
    jsonl = "jsonl"


class Order(Enum):
    completion = "completion"
    input = "input"


class Redo(Enum):
    length = "length"
    error = "error"


class ReportTo(Enum):
    wandb = "wandb"
    mlflow = "mlflow"


@dataclass
class OutputConfig:
    """Where the answers go."""

    dir: str = key(MISSING, "a folder, or a place in an object store such as s3://bucket/run")
    format: OutputFormat = key(OutputFormat.arrow, "of the parts")
    rows_per_shard: int = key(10_000, "of a part, at most")
    flush_seconds: float = key(60.0, "at most this much finished work is lost when the process is killed")
    compression: str | None = key("zstd", "zstd, lz4 or null")
    order: Order = key(Order.completion, "of the rows: as they are completed, or input: as they were read")
    overwrite: bool = key(False, "delete the rows that output.dir holds and start afresh")
    redo: Redo | None = key(None, "rerun only the rows of this finish_reason and replace them")
    token_ids: bool = key(False, "add the column `generated_token_ids`")
    report_to: list[ReportTo] = key([], "send the counters of _metrics.jsonl to these too: wandb, mlflow")
    prometheus_file: str | None = key(None, "write them into this file too, for node_exporter; one for each shard")
