"""The data-set card: README.md as the hub reads it, with everything that says how the data came to be."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from batchmix.annotate.checks import checks_text, read_checks
from batchmix.annotate.columns import AGREEMENT, CONFIDENCE, CONSISTENT, ENTROPY, INVALID, MAJORITY
from batchmix.annotate.config import ExportConfig
from batchmix.annotate.corrections import REVIEWED
from batchmix.annotate.results import Results
from batchmix.output.columns import CHOICE_PROBABILITIES, GUIDED_LOGPROBS
from batchmix.templates.chat_template import AUTO, is_jinja

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
MADE_BY = "Made by batchmix:"  # begins the text of every card
_MEANINGS = {
    "row": "ordinal of the row in the source data",
    "id": "id of the row in the source data, else its ordinal",
    "sample_index": "which of the row's samples",
    CONFIDENCE.name: "the model's probability of the answer",
    INVALID.name: "why the text is no answer of the task",
    MAJORITY.name: "whether this sample stands for its row",
    AGREEMENT.name: "share of the row's valid samples that give this answer",
    ENTROPY.name: "of the distribution of the row's answers, in nats",
    CONSISTENT: "the answer where both orders of the swapped columns agree",
    REVIEWED: "whether a person checked the answer, which then is the person's",
    "generated_text": "what the model wrote",
    "finish_reason": "stop, length (cut off) or error",
    "stop_reason": "the stop string or token that ended the text",
    "prompt_tokens": "",
    "completion_tokens": "",
    "cumulative_logprob": "log-probability of the text",
    CHOICE_PROBABILITIES.name: "the model's probability of each choice, in the order of the choices",
    GUIDED_LOGPROBS.name: "log-probability of each token among those that the answer's form allowed",
    "error": "why there is no answer",
}


def card(results: Results, settings: ExportConfig, counts: Counter[str], schema: pa.Schema) -> str:
    """The text of README.md."""
    config, run = results.run["config"], results.run
    title = settings.title or results.title
    licence = settings.license or "unknown"
    head = {
        "license": licence,
        "pretty_name": title,
        "tags": ["synthetic", "batchmix"],
        "size_categories": [next((name for most, name in _SIZES if counts["rows"] < most), "n>1B")],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    }
    sampling = {key: value for key, value in config["sampling"].items() if value is not None}
    model = config["model"]["path"] if config["model"]["path"] == "tiny" else Path(config["model"]["path"]).name
    sections = [
        "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---",
        f"# {_inline(title)}",
        f"{MADE_BY} a language model answered every row of a data set. **The answers"
        " are the model's, not people's**" + (", but for the rows marked `reviewed`." if counts["reviewed"] else "."),
        "## Counts",
        _counts(counts),
        *(["## Checks", _block(checks_text(checks))] if (checks := read_checks(results.storage)) else []),
        "## Columns",
        _columns(results, schema),
        "## Model",
        f"`{model}` (sha256 of its files' names and sizes: `{run['identity']['model']}`), {run['identity']['model.dtype']},"
        f" batchmix {run['versions']['batchmix']}, revision {run['git_revision'] or 'unknown'}.",
        "## Prompt",
        "Jinja over the columns of a row:" if config["data"]["template"] else "The rows' own prompts or messages.",
        *([_block(config["data"]["template"])] if config["data"]["template"] else []),
        *([f"System prompt:\n\n{_block(config['data']['system_prompt'])}"] if config["data"]["system_prompt"] else []),
        *([f"System prompts: the column `{name}`."] if (name := config["data"].get("system_prompt_column")) else []),
        f"Chat template: {_template(config['data'].get('chat_template', 'auto'))}",
        "## Sampling",
        _block(json.dumps(sampling, indent=2, ensure_ascii=False)),
        "## Source and licence",
        f"Source data: {_source(config['data']['path'])}. Licence of this data set: {licence}"
        + ("." if settings.license else " (nobody has stated it: `export.license`)."),
        "The licences of the source data and of the model apply too.",
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _template(setting: str) -> str:
    if is_jinja(setting):
        return f"\n\n{_block(setting)}"
    return "the model's own (`auto`)." if setting == AUTO else f"`{setting}`."


def _counts(counts: Counter[str]) -> str:
    lines = [f"- records: {counts['rows']:,}", f"- without an answer (`error`): {counts['errors']:,}"]
    if "invalid" in counts:
        lines.append(f"- whose text is no answer (`invalid`): {counts['invalid']:,}")
    if "reviewed" in counts:
        lines.append(f"- checked by people (`reviewed`): {counts['reviewed']:,}")
    return "\n".join(lines)


def _columns(results: Results, schema: pa.Schema) -> str:
    fields = {field.name: field for field in results.answer.fields} if results.answer is not None else {}
    lines = ["| column | type | |", "|---|---|---|"]
    for column in schema:
        if column.name in fields:
            labels = fields[column.name].labels
            meaning = "the answer" + (f": {', '.join(labels)}" if labels else "")
        else:
            meaning = _MEANINGS.get(column.name, "from the source data")
        kind = "label" if pa.types.is_dictionary(column.type) else str(column.type)
        lines.append(f"| {_inline(column.name)} | {_inline(kind)} | {_inline(meaning)} |")
    return "\n".join(lines)


def _source(path: Any) -> str:
    paths = path if isinstance(path, list) else [path]
    return ", ".join(f"`{_inline(str(item))}`" for item in paths)


def _inline(text: str) -> str:
    """One line that is no markup of a table or a page."""
    text = " ".join(text.split())
    return (
        "".join(f"\\{char}" if char in "\\|<>[]*_#`" else char for char in text)
        if set(text) & set("|<>[]*#`\\")
        else text
    )


def _block(text: str) -> str:
    """A fenced block, its fence longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text.rstrip()}\n{fence}"
