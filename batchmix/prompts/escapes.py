"""A warning of texts in the configuration that hold a backslash and a letter where a newline or a tab may be meant."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from batchmix.config import Config
from batchmix.templates.template import RowTemplate

# Not those with which a command of LaTeX begins: \nabla, \neq, \text, \right; \n before other words is a newline's.
_LATEX = r"abla|eq|e|u|ot|i|eg|exists|mid|parallel|ewline|ewcommand|oindent|ormalsize"
_ESCAPE = re.compile(rf"\\(?:n(?!(?:{_LATEX})(?![a-z]))|[rt](?![a-z]))")
_NAMES = {"n": ("an n", "newline"), "r": ("an r", "carriage return"), "t": ("a t", "tab")}

_log = logging.getLogger(__name__)


def warn_of_escapes(config: Config) -> None:
    """Log a line for each key whose text holds `\\n`, `\\r` or `\\t` in letters: Hydra and YAML take them as they are.

    Nothing is changed. What a Jinja expression quotes is Python's, and no mistake.
    """
    for key, text in _texts(config):
        if found := _ESCAPE.search(text):
            escape = found[0]
            letter, name = _NAMES[escape[1]]
            quoted = f'["{escape}"]' if key == "sampling.stop" else f'"{escape}"'  # a list of texts
            _log.warning(
                "%s holds %s, a backslash and %s, which is no %s; for a %s write $'%s=%s' in bash or \"%s\" in double"
                " quotes in a YAML file", key, escape, letter, name, name, key, quoted, escape,
            )  # fmt: skip


def _texts(config: Config) -> Iterator[tuple[str, str]]:
    yield "sampling.stop", "\n".join(config.sampling.stop or ())
    yield "data.system_prompt", config.data.system_prompt or ""
    task = config.annotate
    if task.input is not None:  # whose parts make data.template
        yield "annotate.instruction", _outside_braces(task.instruction)
        yield "annotate.input", _outside_braces(task.input)
    else:
        yield "data.template", _outside_braces(config.data.template)


def _outside_braces(template: str | None) -> str:
    return RowTemplate(template).plain_text if template else ""
