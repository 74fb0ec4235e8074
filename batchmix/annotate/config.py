"""The keys of `annotate`, `evaluate`, `export` and `review`: tasks, and what people do with their answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from batchmix.config_key import key


class ExportFormat(Enum):
    parquet = "parquet"
    jsonl = "jsonl"
    csv = "csv"


class ReviewTool(Enum):
    label_studio = "label_studio"
    argilla = "argilla"


@dataclass
class AnnotateConfig:
    """A labelling task, as the files of conf/annotate/ state it (docs/annotate.md). At most one of choice, regex,
    json_schema and pydantic; with none of them an answer is any text."""

    input: str | None = key(None, "the row's own text, at the end of the prompt: Jinja over the row's columns")
    instruction: str | None = key(
        None, "what is asked, at the beginning of the prompt: Jinja too; rows share it up to its first column"
    )
    examples: Any = key(None, "list of {input: text, answer: value}, or a .jsonl, .json or .yaml file of them")
    field: str = key("label", "name of the answer's column, where the answer is not a JSON object")
    choice: list[str] | None = key(None, "the labels that an answer may be")
    regex: str | None = key(None, "a regex that the whole answer matches; its named groups become columns")
    json_schema: Any = key(None, "JSON Schema of the answer, or a file that holds one; its properties become columns")
    pydantic: str | None = key(None, "package.module:Class, a pydantic class whose JSON Schema the answer fits")
    swap_labels: list[str] | None = key(
        None, "two labels that are swapped back in the samples where data.swap_columns are swapped"
    )
    gold: Any = key(None, "column of people's answers, or {field: column}; the results are checked against it")
    bootstrap: int = key(1000, "number of bootstrap resamples for the intervals of the checks")
    report_rows: int = key(500, "number of rows in the table of report.html")


@dataclass
class EvaluateConfig:
    """What `batchmix evaluate` compares answers with."""

    gold_column: str = key("gold", "column with the right answers; compared as text without spaces at both ends")


@dataclass
class ExportConfig:
    """What `batchmix export` makes of a finished run in output.dir."""

    dir: str = key("", "folder for the files and the data-set card")
    format: ExportFormat = key(ExportFormat.parquet, "format of the files")
    rows_per_file: int = key(1_000_000, "most rows of one file")
    guard_formulas: bool = key(
        True, "csv: put a ' before texts that begin with =, +, -, @, tab or newline, which spreadsheets run"
    )
    samples: bool = key(False, "true: every sample of a row; false: the majority's (without a task, the first)")
    corrections: str | None = key(None, "file of `batchmix review import`, whose answers replace the model's")
    repo_id: str | None = key(None, "push to this data set on the hub")
    private: bool = key(True, "make a new repository private")
    license: str | None = key(None, "licence of the data, as the hub spells it: apache-2.0, cc-by-4.0, ...")
    title: str | None = key(None, "title of the card; null: the folder's name")


@dataclass
class ReviewConfig:
    """What `batchmix review` hands to people and takes back."""

    action: str = key("export", "export or import; batchmix review ACTION is short for it")
    tool: ReviewTool = key(ReviewTool.label_studio, "tool that the files are for")
    rows: int = key(100, "how many of the least certain rows")
    path: str = key("", "export: the file (Label Studio) or folder (Argilla) to make; import: what the tool exported")
    corrections: str = key("corrections.jsonl", "import: the file to write, for export.corrections")
