"""`data.template`: Jinja over a row's columns, in a sandbox, since both the template and the data may be anyone's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import meta

from batchmix.data.counted_jinja import CountedEnvironment, counted
from batchmix.data.messages import PromptError, check_text
from batchmix.errors import BatchmixError


class RowTemplate:
    """A compiled `data.template`, or another key's. `variables` are the columns that it names. A line break at its end
    is part of its text.

    >>> RowTemplate("Translate: {{ text }}").render({"text": "bonjour"})
    'Translate: bonjour'
    """

    def __init__(self, source: str, key: str = "data.template", may_be_empty: bool = False) -> None:
        if not source:
            raise BatchmixError(f"{key}=: is empty; leave it out or set it to null")
        self._key, self._may_be_empty = key, may_be_empty
        environment = CountedEnvironment(
            undefined=jinja2.StrictUndefined, finalize=_not_null, keep_trailing_newline=True
        )
        try:
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
            self._template = environment.from_string(source)
        except UnicodeEncodeError:
            raise BatchmixError(f"{key} is not valid Unicode") from None
        except jinja2.TemplateSyntaxError as error:
            raise BatchmixError(f"{key}, line {error.lineno}: {error.message}") from None
        except RecursionError:
            raise BatchmixError(f"{key} is nested too deeply") from None

    def render(self, columns: Mapping[str, Any]) -> str:
        """The text of one row; PromptError where the template fails on it, prints a null or gives no text."""
        try:
            text = counted(lambda: self._template.render(columns))
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PromptError(f"{self._key} fails on this row: {reason}") from None
        if not text and not self._may_be_empty:
            raise PromptError(f"{self._key} gives an empty text for this row")
        return check_text(text, f"the text of {self._key}")


def _not_null(value: object) -> object:
    if value is None:
        raise ValueError("a printed value is null (|default('', true) prints nothing for it)")
    return value
