"""Which columns of a row hold its prompt: those that the configuration names, else those that are called as usual."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from batchmix.input.config import DataConfig


def value_of_column(columns: Mapping[str, Any], name: str) -> Any:
    """The row's value of a column, or of a field of one: `meta.text` of {"meta": {"text": ...}}; None where it has none."""
    if name in columns or "." not in name:
        return columns.get(name)
    value: Any = columns
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def column_of(name: str, names: Collection[str]) -> str:
    """The column among `names` that `value_of_column` looks into."""
    first = name.partition(".")[0]
    return first if name not in names and first in names else name


@dataclass(frozen=True)
class PromptColumns:
    """The columns that are looked at, the first that a row has being its prompt; None for one that is not.

    >>> PromptColumns.of(DataConfig("p.jsonl")).names
    ('prompt_token_ids', 'messages', 'prompt')
    >>> PromptColumns.of(DataConfig("p.jsonl", prompt_column="prompt")).names
    ('prompt',)
    """

    token_ids: str | None
    messages: str | None
    prompt: str | None
    named: bool = False  # by the configuration

    KEYS: ClassVar[tuple[str, ...]] = ("token_ids_column", "messages_column", "prompt_column")

    @classmethod
    def of(cls, data: DataConfig | Mapping[str, Any]) -> PromptColumns:
        """`data`: the configuration, or what a finished run stored of it."""
        get = data.get if isinstance(data, Mapping) else vars(data).get
        token_ids, messages, prompt = (get(key) for key in cls.KEYS)
        if (token_ids, messages, prompt) == (None, None, None):
            return cls("prompt_token_ids", "messages", "prompt")
        return cls(token_ids, messages, prompt, named=True)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.token_ids, self.messages, self.prompt) if name is not None)

    @property
    def messages_or_prompt_named(self) -> bool:
        return self.named and (self.messages is not None or self.prompt is not None)
