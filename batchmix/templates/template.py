"""`data.template`: Jinja over a row's columns, in a sandbox, since both the template and the data may be anyone's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import jinja2
from jinja2 import meta, nodes

from batchmix.errors import BatchmixError
from batchmix.templates.counted_jinja import CountedEnvironment, counted
from batchmix.templates.messages import PromptError, check_text

_WORDS = re.compile(r"\{\{[-+]?\s*(\w+(?: +\w+)+)\s*(?:\||[-+]?\}\})")  # printed as if they were one name
_KEYWORDS = {"if", "else", "in", "is", "not", "and", "or"}


class RowTemplate:
    """A compiled `data.template`, or another key's. `variables` are the columns that it names. A line break at its end
    is part of its text.

    A column whose name is no Jinja identifier is written row['Review Text']. Where the data has a column `row`, `row`
    is that column.

    >>> RowTemplate("Translate: {{ text }}").render({"text": "bonjour"})
    'Translate: bonjour'
    >>> RowTemplate("{{ row['Review Text'] }}").render({"Review Text": "Nice"})
    'Nice'
    """

    def __init__(self, source: str, key: str = "data.template", may_be_empty: bool = False) -> None:
        if not source:
            raise BatchmixError(f"{key}=: is empty; leave it out or set it to null")
        self._key, self._may_be_empty = key, may_be_empty
        environment = CountedEnvironment(
            undefined=jinja2.StrictUndefined, finalize=_not_null, keep_trailing_newline=True
        )
        try:
            tree = environment.parse(source)
            self._plain = "".join(text for _, kind, text in environment.lex(source) if kind == "data")
            self._names = frozenset(meta.find_undeclared_variables(tree))
            self._items = _row_items(tree) if "row" in self._names else None
            self._template = environment.from_string(source)
        except UnicodeEncodeError:
            raise BatchmixError(f"{key} is not valid Unicode") from None
        except jinja2.TemplateSyntaxError as error:
            raise BatchmixError(f"{key}, line {error.lineno}: {error.message}{_hint(source, error.lineno)}") from None
        except RecursionError:
            raise BatchmixError(f"{key} is nested too deeply") from None

    @property
    def variables(self) -> frozenset[str]:
        return self.columns(())

    def columns(self, known: Collection[str]) -> frozenset[str]:
        """The columns that it names, of data that has the columns `known`."""
        if self._items is None or "row" in known:
            return self._names
        return self._names - {"row"} | self._items

    @property
    def plain_text(self) -> str:
        """What of the template is written as it is, without what stands in braces."""
        return self._plain

    def render(self, columns: Mapping[str, Any]) -> str:
        """The text of one row; PromptError where the template fails on it, prints a null or gives no text."""
        try:
            if self._items is not None and "row" not in columns:
                columns = {**columns, "row": columns}
            text = counted(lambda: self._template.render(columns))
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PromptError(f"{self._key} fails on this row: {reason}") from None
        if not text and not self._may_be_empty:
            raise PromptError(f"{self._key} gives an empty text for this row")
        return check_text(text, f"the text of {self._key}")


def _hint(source: str, line: int) -> str:
    """What may be meant by a line that cannot be parsed: a column whose name has spaces."""
    lines = re.split(r"\r\n|\r|\n", source)  # as Jinja counts them
    for found in _WORDS.finditer("".join(lines[line - 1 : line])):
        if not _KEYWORDS & set(found[1].split()):
            return f"; if {found[1]!r} is a column, write row[{found[1]!r}]"
    return ""


def _row_items(tree: nodes.Template) -> frozenset[str] | None:
    """The names in row['name'] and row.name; None where `row` is used otherwise too, and so is a column."""
    items: set[str] = set()
    uses = sum(node.name == "row" for node in tree.find_all(nodes.Name))
    names: list[tuple[nodes.Expr, object]] = []
    for item in tree.find_all(nodes.Getitem):
        names.append((item.node, item.arg.value if isinstance(item.arg, nodes.Const) else None))
    for attribute in tree.find_all(nodes.Getattr):
        names.append((attribute.node, None if hasattr(dict, attribute.attr) else attribute.attr))
    for node, name in names:
        if isinstance(node, nodes.Name) and node.name == "row" and isinstance(name, str):
            items.add(name)
            uses -= 1
    return frozenset(items) if uses == 0 else None


def _not_null(value: object) -> object:
    if value is None:
        raise ValueError("a printed value is null (|default('', true) prints nothing for it)")
    return value
