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

    input: str | None = key(None, "Jinja over the row's columns: the row's own text, which ends the prompt")
    instruction: str | None = key(
        None, "Jinja too; begins the prompt, so rows share what it does not take from columns"
    )
    examples: Any = key(None, "list of {input: text, answer: value}, or a .jsonl, .json or .yaml file of them")
    field: str = key("label", "name of the column of an answer that is no JSON object")
    choice: list[str] | None = key(None, "the labels that there are")
    regex: str | None = key(None, "what an answer matches as a whole; named groups become columns")
    json_schema: Any = key(None, "of the answer, or a file of it; properties become columns")
    pydantic: str | None = key(None, "package.module:Class, whose JSON schema is meant")
    swap_labels: list[str] | None = key(None, "labels that change places where data.swap_columns do")
    gold: Any = key(None, "column of people's answers, or {field: column}; the results are checked against it")
    bootstrap: int = key(1000, "resamples behind an interval of the checks")
    report_rows: int = key(500, "rows in the table of report.html")


@dataclass
class EvaluateConfig:
    """What `batchmix evaluate` compares answers with."""

    gold_column: str = key("gold", "of the data; compared as text, spaces at both ends aside")


@dataclass
class ExportConfig:
    """What `batchmix export` makes of a finished run in output.dir."""

    dir: str = key("", "where the files and the data-set card go")
    format: ExportFormat = key(ExportFormat.parquet, "of the files")
    rows_per_file: int = key(1_000_000, "at most")
    guard_formulas: bool = key(
        True, "csv: a ' before texts that begin with =, +, -, @, tab or newline, which spreadsheets run"
    )
    samples: bool = key(False, "every sample of a row; else the majority's (of texts without a task, the first)")
    corrections: str | None = key(None, "people's answers, a file of `batchmix review import`, take the model's place")
    repo_id: str | None = key(None, "push to this data set on the hub")
    private: bool = key(True, "where repo_id is made anew")
    license: str | None = key(None, "of the data, as the hub spells it: apache-2.0, cc-by-4.0, ...")
    title: str | None = key(None, "of the card; null: the folder's name")


@dataclass
class ReviewConfig:
    """What `batchmix review` hands to people and takes back."""

    action: str = key("export", "export or import; batchmix review ACTION is short for it")
    tool: ReviewTool = key(ReviewTool.label_studio, "for which the files are")
    rows: int = key(100, "the least certain ones")
    path: str = key("", "export: the file (Label Studio) or folder (Argilla) to make; import: what the tool exported")
    corrections: str = key("corrections.jsonl", "import: the file to make, for export.corrections")
