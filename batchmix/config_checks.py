"""Whether the values of a configuration make sense together; Hydra and the dataclasses have refused what is wrong alone."""

from __future__ import annotations

import math

from batchmix.config import Config
from batchmix.distributed.config import ClusterKind
from batchmix.errors import BatchmixError
from batchmix.sampling_checks import check_sampling


def _is_text_encoding(name: str) -> bool:
    try:
        "".encode(name)
    except (LookupError, ValueError):
        return False
    return True


def check(config: Config) -> Config:
    """Return `config` if its values make sense together; BatchmixError naming the key otherwise."""

    def refuse(key: str, value: object, remedy: str) -> BatchmixError:
        return BatchmixError(f"{key}={value}: {remedy}")

    try:
        check_sampling(config.sampling)
    except ValueError as error:
        raise BatchmixError(str(error)) from None
    if not 0 <= config.shard.index < config.shard.count:
        raise refuse("shard.index", config.shard.index, f"must be from 0 to shard.count - 1 = {config.shard.count - 1}")
    for group, key in (("engine", "max_num_seqs"), ("engine", "max_num_batched_tokens"), ("engine", "sort_window"),
                       ("output", "rows_per_shard"), ("model", "max_model_len"), ("model", "tensor_parallel_size"),
                       ("engine", "data_parallel_size"), ("data", "limit"),
                       ("data", "max_buffered_bytes"), ("plan", "expected_tokens"), ("plan", "sample_rows"),
                       ("cluster", "workers"), ("cluster", "cpus_per_worker"), ("cluster", "rows_per_unit"),
                       ("export", "rows_per_file"), ("review", "rows"), ("annotate", "bootstrap")):  # fmt: skip
        value = getattr(getattr(config, group), key)
        if value is not None and value < 1:
            raise refuse(f"{group}.{key}", value, "must be at least 1")
    if config.cluster.kind is ClusterKind.ray:
        if config.engine.data_parallel_size > 1:
            raise refuse(
                "engine.data_parallel_size",
                config.engine.data_parallel_size,
                "cluster=ray has a model on each GPU without it; leave it at 1",
            )
        if config.engine.trace:
            raise refuse("engine.trace", "true", "traces one machine; leave it out with cluster=ray")
    for key in ("dollars_per_hour", "deadline_hours", "host_memory_gb"):
        value = getattr(config.plan, key)
        if value is not None and not 0 < value < math.inf:
            raise refuse(f"plan.{key}", value, "must be above 0")
    if not 0 <= config.data.max_error_share <= 1:
        raise refuse("data.max_error_share", config.data.max_error_share, "must be from 0 to 1")
    if not 0 < config.engine.gpu_memory_utilization <= 1:
        raise refuse(
            "engine.gpu_memory_utilization", config.engine.gpu_memory_utilization, "must be above 0, at most 1"
        )
    if any("\ud800" <= char <= "\udfff" for char in config.output.dir):
        raise refuse("output.dir", config.output.dir, "pyarrow opens no files in a folder whose name is not Unicode")
    if not 0 < config.shard.heartbeat_seconds <= config.shard.takeover_seconds / 3:
        raise refuse("shard.heartbeat_seconds", config.shard.heartbeat_seconds,
                     f"must be above 0 and at most a third of shard.takeover_seconds={config.shard.takeover_seconds}")  # fmt: skip
    delimiter, encoding = config.data.csv_delimiter, config.data.csv_encoding
    if delimiter not in (None, "\\t") and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise refuse("data.csv_delimiter", delimiter, "must be one character, or \\t for a tab")
    if encoding is not None and not _is_text_encoding(encoding):
        raise refuse(
            "data.csv_encoding", encoding, "is no encoding of text that Python knows; utf-8, cp1252, utf-16, ... are"
        )
    picture = config.plan.histogram
    if picture is not None and "://" in picture:
        raise refuse("plan.histogram", picture, "the picture is written on this machine; give the path of a file")
    if picture is not None and not picture.lower().endswith((".svg", ".html")):
        raise refuse("plan.histogram", picture, "must end in .svg or .html; no other picture is drawn")
    if not config.output.flush_seconds > 0:
        raise refuse("output.flush_seconds", config.output.flush_seconds, "must be above 0")
    if config.output.compression not in (None, "zstd", "lz4"):
        raise refuse("output.compression", config.output.compression, "must be zstd, lz4 or null")
    return config
