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
    format: DataFormat = key(DataFormat.auto, "auto: by the files' names")
    split: str = key("train", "of a hub data set")
    csv_delimiter: str | None = key(None, r"one character, \t for a tab; null: a comma, a tab in files called .tsv")
    csv_encoding: str | None = key(None, "as Python calls it: cp1252, utf-16, ...; null: utf-8")
    messages_column: str | None = key(None, "list of {role, content}; null: messages, where no prompt column is named")
    prompt_column: str | None = key(
        None, "plain text, sent as one user message or to a base model as it is; null: prompt, as above"
    )
    token_ids_column: str | None = key(None, "token ids, used as they are; null: prompt_token_ids, as above")
    id_column: str | None = key(
        None, "fills id and keys the random numbers; null: id, custom_id or uuid fills it, the ordinal is the key"
    )
    columns: list[str] | None = key(None, "kept in the output; null: all")
    chat_template: str = key(
        "auto", "auto (the model's own, none for a base model), none, mistral, a Jinja file or Jinja text"
    )
    system_prompt: str | None = key(
        None, "Jinja over the row's columns; for rows whose messages have no system message"
    )
    system_prompt_column: str | None = key(None, "each row's system prompt; where it is null, data.system_prompt")
    template: str | None = key(
        None, "Jinja over the columns of a row, in at most 250,000 steps; its result is the row's prompt"
    )
    swap_columns: list[str] | None = key(None, "two that change places in data.template for samples 1, 3, 5, ...")
    limit: int | None = key(None, "the first so many rows; null: all")
    max_buffered_bytes: int | None = key(
        None, "memory for rows between input and output; null: 2 % of what is free, from 128 MiB to 4 GiB"
    )
    max_error_share: float = key(
        1.0, "of the rows of the whole data set: a run with more error rows, or with no answer at all, fails at its end"
    )
    on_error: OnError = key(OnError["record"], "of a row that cannot be run: record it as an error row, or raise")


@dataclass
class ShardConfig:
    """Which share of the rows this process runs: those with row % count == index."""

    index: int = key(0, "of this process, from 0")
    count: int = key(1, "processes that share the rows")
    heartbeat_seconds: float = key(10.0, "how often this worker says that it is alive, see docs/clusters.md")
    takeover_seconds: float = key(90.0, "without a heartbeat, after which another process may take this shard over")
