"""The keys of `data` and `shard`: where rows come from, and which of them this process reads."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from batchmix.config_key import key


class DataFormat(Enum):
    auto = "auto"
    jsonl = "jsonl"
    parquet = "parquet"
    arrow = "arrow"
    csv = "csv"
    text = "text"  # a prompt a line, in a column `prompt`
    openai_batch = "openai_batch"


OnError = Enum("OnError", ["record", "raise"])  # `raise` is a keyword: OnError["raise"]


@dataclass
class DataConfig:
    """Where the rows come from and how a row becomes a prompt.

    Where none of the three `*_column` of prompts is named, a row's prompt is in whichever of the columns prompt_token_ids,
    messages and prompt it has, in this order. Where one is named, only those that are named count.
    """

    path: Any = key(MISSING, "one or many: file, folder, glob, fsspec URL, or the name of a hub data set")
    format: DataFormat = key(DataFormat.auto, "format of the files; auto: by their names and bytes")
    split: str = key("train", "split of a hub data set")
    csv_delimiter: str | None = key(None, r"one character, \t for a tab; null: a comma, a tab in files called .tsv")
    csv_encoding: str | None = key(None, "Python's name of the encoding: cp1252, utf-16, ...; null: utf-8")
    messages_column: str | None = key(
        None, "column with a list of {role, content}; null: messages, unless another prompt column is named"
    )
    prompt_column: str | None = key(
        None, "column with a text: one user message, or for a base model the prompt itself; null: prompt, as above"
    )
    token_ids_column: str | None = key(
        None, "column with token ids, used as they are; null: prompt_token_ids, as above"
    )
    id_column: str | None = key(
        None,
        "column of ids, which also seed the rows' random numbers; null: id, custom_id or uuid, and the ordinal seeds",
    )
    columns: list[str] | None = key(None, "columns that the output keeps; null: all")
    chat_template: str = key(
        "auto", "auto (the model's own, none for a base model), none, mistral, a Jinja file or Jinja text"
    )
    system_prompt: str | None = key(
        None, "system prompt for rows whose messages have none: Jinja over the row's columns"
    )
    system_prompt_column: str | None = key(
        None, "column with each row's system prompt; where it is null, data.system_prompt is used"
    )
    template: str | None = key(None, "the row's prompt: Jinja over its columns, in at most 250,000 steps")
    swap_columns: list[str] | None = key(None, "two columns that are swapped in data.template for samples 1, 3, 5, ...")
    limit: int | None = key(None, "how many rows to take from the beginning; null: all")
    max_buffered_bytes: int | None = key(
        None, "memory for rows between input and output; null: 2 % of free memory, from 128 MiB to 4 GiB"
    )
    max_error_share: float = key(
        1.0, "share of all rows; a run with more error rows, or without any answer, ends with exit code 1"
    )
    on_error: OnError = key(
        OnError["record"], "what to do with a row that cannot be run: record it as an error row, or raise"
    )


@dataclass
class ShardConfig:
    """Which share of the rows this process runs: those with row % count == index."""

    index: int = key(0, "which share of the rows this process has, from 0")
    count: int = key(1, "number of processes that share the rows")
    heartbeat_seconds: float = key(10.0, "seconds between heartbeats of this worker (docs/clusters.md)")
    takeover_seconds: float = key(
        90.0, "seconds without a heartbeat after which another process may take over this shard"
    )
