"""What a task takes for an answer: how a text is parsed and checked, and which columns it fills."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

import pyarrow as pa

from batchmix.annotate.arrow_types import Field, enum_field, field_of, resolve
from batchmix.errors import BatchmixError
from batchmix.install_hint import install_hint

_INT64 = 2**63
_MOST_LABELS_SHOWN = 8


class Invalid(ValueError):
    """Why a text is no answer of the task, in one line."""


class Answer(Protocol):
    """The kind of answer that a task wants."""

    fields: list[Field]

    def parse(self, text: str) -> dict[str, Any]:
        """The value of each field; Invalid where the text is no answer."""

    def decisions(self, text: str) -> list[tuple[int, int]]:
        """Where a valid text says what is chosen of a few: spans of characters; none: all of the text, and its end, does."""

    def describe(self) -> str:
        """The line that tells the model what to answer; empty where anything goes."""


class _Whole:
    """An answer that is one decision."""

    def decisions(self, text: str) -> list[tuple[int, int]]:
        return []


class Text(_Whole):
    """Any text, without the white space around it."""

    def __init__(self, field: str) -> None:
        self.fields = [Field(field, pa.string())]

    def parse(self, text: str) -> dict[str, Any]:
        stripped = text.strip()
        if not stripped:
            raise Invalid("the answer is empty")
        return {self.fields[0].name: stripped}

    def describe(self) -> str:
        return ""


class Choice(_Whole):
    """One of a few labels.

    >>> Choice("label", ["yes", "no"]).parse(" yes")
    {'label': 'yes'}
    """

    def __init__(self, field: str, labels: list[str]) -> None:
        if not labels or len(set(labels)) < len(labels) or any(label != label.strip() or not label for label in labels):
            raise BatchmixError(f"annotate.choice={labels}: must be different labels without white space around them")
        self.labels = labels
        self.fields = [enum_field(field, labels)]

    def parse(self, text: str) -> dict[str, Any]:
        label = text.strip()
        if label not in self.labels:
            shown = ", ".join(self.labels[:_MOST_LABELS_SHOWN]) + ", ..." * (len(self.labels) > _MOST_LABELS_SHOWN)
            yaml = "; in YAML yes, no, on and off without quotes are booleans" * (label.lower() in ("true", "false"))
            raise Invalid(f"the answer {_short(label)} is none of {shown}{yaml}")
        return {self.fields[0].name: label}

    def describe(self) -> str:
        return f"Answer with one of these words and nothing else: {', '.join(self.labels)}"


class Pattern(_Whole):
    """A text that matches a regular expression as a whole. Its named groups are the columns, or else all of it is."""

    def __init__(self, field: str, regex: str) -> None:
        try:
            self._regex = re.compile(regex)
        except re.error as error:
            raise BatchmixError(f"annotate.regex={regex}: is no regular expression ({error})") from None
        self._groups = list(self._regex.groupindex)
        self.fields = [Field(name, pa.string()) for name in self._groups or [field]]

    def parse(self, text: str) -> dict[str, Any]:
        match = self._regex.fullmatch(text) or self._regex.fullmatch(text.strip())
        if match is None:
            raise Invalid(f"the answer {_short(text)} does not match {_short(self._regex.pattern)}")
        return match.groupdict() if self._groups else {self.fields[0].name: match[0]}

    def describe(self) -> str:
        return f"Answer with a text that matches this regular expression and nothing else: {self._regex.pattern}"


class Json:
    """JSON that a schema allows. The properties of an object are the columns, anything else is the column `field`."""

    def __init__(self, field: str, schema: Mapping[str, Any]) -> None:
        try:
            import jsonschema
        except ModuleNotFoundError:
            raise BatchmixError(f"annotate.json_schema needs jsonschema: {install_hint('annotate')}") from None
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise BatchmixError(
                f"annotate.json_schema: is no JSON Schema: {error.json_path}: {error.message}"
            ) from None
        self.schema = schema
        self._validator = kind(schema)
        top = resolve(schema, schema)
        properties = top.get("properties") if isinstance(top, Mapping) else None
        self._is_object = bool(properties)
        parts = properties if properties else {field: schema}
        self.fields = [field_of(name, part, schema) for name, part in parts.items()]

    def parse(self, text: str) -> dict[str, Any]:
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Invalid(f"the answer {_short(text)} is no JSON: {_one_line(str(error))}") from None
        misfit = next(self._validator.iter_errors(value), None)
        if misfit is not None:
            raise Invalid(f"the answer does not fit the schema: {misfit.json_path}: {_one_line(misfit.message)}")
        values = value if self._is_object else {self.fields[0].name: value}
        found = {}
        for field in self.fields:
            try:
                found[field.name] = values.get(field.name)
                field.column([found[field.name]])
            except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
                raise Invalid(f"{field.name}: {_one_line(str(error))}") from None
        return found

    def decisions(self, text: str) -> list[tuple[int, int]]:
        """The values of an object's members that are classes. A row with a grammar of its own may space them as it likes."""
        classes = {field.name for field in self.fields if field.is_class}
        if not self._is_object or not classes or not text.lstrip().startswith("{"):
            return []
        found = []
        decoder, place = json.JSONDecoder(), _next_token(text, text.index("{") + 1)
        while text[place] != "}":
            name, place = decoder.raw_decode(text, place)
            place = _next_token(text, place)
            value, end = decoder.raw_decode(text, place)
            if name in classes:  # of a number, what follows says that it has no more digits: 1 is not 10
                found.append((place, end + (type(value) in (int, float))))
            place = _next_token(text, end)
        return found

    def describe(self) -> str:
        return f"Answer with one line of JSON that fits this schema and nothing else: {json.dumps(self.schema, ensure_ascii=False)}"


def _next_token(text: str, place: int) -> int:
    """Where JSON goes on at `place` or after it, behind white space, a comma or a colon."""
    while text[place] in " \t\r\n,:":
        place += 1
    return place


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _short(text: str) -> str:
    """The text in quotes, in ASCII, with an end."""
    text = " ".join(text.split())
    return ascii(text) if len(text) <= 60 else ascii(text[:57]) + "..."


def _one_line(message: str) -> str:
    message = " ".join(message.split()).encode("ascii", "backslashreplace").decode()
    return message if len(message) <= 160 else message[:157] + "..."
