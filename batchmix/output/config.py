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
    format: OutputFormat = key(OutputFormat.arrow, "format of the part files")
    rows_per_shard: int = key(10_000, "most rows of a part file")
    flush_seconds: float = key(
        60.0, "seconds between commits: so much finished work is lost at most when the process is killed"
    )
    compression: str | None = key("zstd", "compression of Arrow and Parquet: zstd, lz4 or null")
    order: Order = key(
        Order.completion, "order of the rows: completion, as they are finished; input, as they were read"
    )
    overwrite: bool = key(False, "delete the rows that output.dir holds and start afresh")
    redo: Redo | None = key(None, "run only the rows with this finish_reason again, and replace them")
    token_ids: bool = key(False, "add the column `generated_token_ids`")
    report_to: list[ReportTo] = key([], "send the counters of metrics.jsonl to these too: wandb, mlflow")
    prometheus_file: str | None = key(None, "write them into this file too, for node_exporter; one for each shard")
