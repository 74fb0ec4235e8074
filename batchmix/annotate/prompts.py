"""The prompt of a record, made again from the columns that the output kept: the output itself holds answers alone."""

from __future__ import annotations

from typing import Any

from batchmix.annotate.results import Results
from batchmix.input.prompt_columns import PromptColumns, value_of_column
from batchmix.templates.messages import PromptError
from batchmix.templates.template import RowTemplate
from batchmix.written_config import value_of


class RowPrompts:
    """`of(record)` is what a person reads as the record's prompt."""

    def __init__(self, results: Results) -> None:
        data = results.run["config"]["data"]
        template = value_of(results.run, "data", "template")
        self._template = None if template is None else RowTemplate(template)
        self._prompts = PromptColumns.of(data)
        names = {*(self._template.variables if self._template else ()), *self._prompts.names}
        names |= {name.partition(".")[0] for name in names}
        self._columns = {name: results.column_of(name) for name in names}

    def of(self, record: dict[str, Any]) -> str:
        """Empty where the columns are not there. Of swapped columns, the order of even samples."""
        values = {name: record[column] for name, column in self._columns.items() if column is not None}
        if self._template is not None:
            try:
                return self._template.render(values)
            except PromptError:
                return ""
        messages = value_of_column(values, self._prompts.messages or "")
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            return "\n\n".join(
                f"{message.get('role') or message.get('from')}: {message.get('content') or message.get('value')}"
                for message in messages
            )
        return str(messages or value_of_column(values, self._prompts.prompt or "") or "")
