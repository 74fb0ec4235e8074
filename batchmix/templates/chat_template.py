"""Which template makes text of messages and plain prompts: `data.chat_template`, or what the model folder says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2

from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.json_file import read_object
from batchmix.templates.counted_jinja import CountedEnvironment, counted

AUTO, NONE, MISTRAL = "auto", "none", "mistral"
_JINJA = ("{{", "{%", "{#")
_NAMED = "additional_chat_templates"  # a folder of transformers'


@dataclass(frozen=True)
class ChatFormat:
    """How a tokenizer makes text of a row. `name` says in the log which template it is and why."""

    name: str
    chats: bool = True  # whether messages can be rendered; a base model's cannot
    prompts: bool | None = True  # a plain prompt is sent as a user message; False: as it is; None: nothing says which
    origin: str = "the model's chat template"  # in error messages


@dataclass(frozen=True)
class TemplateOptions:
    """What a template is told beside the messages."""

    add_generation_prompt: bool = True  # where the last message is not to be continued
    tools: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)  # more of them, by name


def read_chat_template(config: Config) -> Config:
    """`config` with the text of the file that data.chat_template names, so that the run's identity and workers on other
    machines have the text. Other values stay as they are.
    """
    given = config.data.chat_template
    if given in (AUTO, NONE, MISTRAL) or is_jinja(given):
        return config
    if not given:
        raise BatchmixError(f"data.chat_template=: give {AUTO}, {NONE}, {MISTRAL}, a Jinja file or Jinja text")
    try:
        path = Path(given).expanduser()
        if not path.is_file():
            if path.suffix or path.name != given:
                raise BatchmixError(f"data.chat_template={given}: there is no such file")
            return config  # the name of one of the model folder's templates
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        raise BatchmixError(f"data.chat_template={given}: cannot be read ({error})") from None
    if not is_jinja(text):
        raise BatchmixError(f"data.chat_template={given}: the file has no Jinja in it, neither {{{{ nor {{%")
    return replace(config, data=replace(config.data, chat_template=text))


def is_jinja(setting: str) -> bool:
    """Whether a value of data.chat_template is a template's text rather than a word or a file's name."""
    return any(mark in setting for mark in _JINJA)


def read_model_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; empty where there is no such file."""
    return read_object(path) if path.exists() else {}


def folder_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a model folder by name, as transformers finds them; `default` is the one that is used.

    Files are preferred to tokenizer_config.json. Empty templates are none.
    """
    found: dict[str, str] = {}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / _NAMED).glob("*.jinja"))}
    try:
        found = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    except (OSError, ValueError) as error:
        raise BatchmixError(f"{folder}: its chat template cannot be read ({error})") from None
    if not found:
        config = folder / "tokenizer_config.json"
        value = read_model_json(config).get("chat_template") or {}
        try:
            if isinstance(value, list):
                value = {entry["name"]: entry["template"] for entry in value}
            found = {"default": value} if isinstance(value, str) else dict(value)
        except (TypeError, KeyError, ValueError):
            found = {"": ""}
        if not all(isinstance(text, str) for item in found.items() for text in item) or "" in found:
            raise BatchmixError(f"{config}: chat_template must be a text, or a list of names and templates")
    return {name: template for name, template in found.items() if template.strip()}


def writes_mistral(template: str, folder: Path, version: int) -> bool:
    """Whether a template of the folder writes the turns that mistral-common's `version` (1 or 3) writes: the same text,
    but that a single space may stand or lack beside a mark ([INST], [/INST], <s>, </s>).

    It is tried on conversations rather than compared: Mistral's template has been published in many wordings.
    Contents begin and end with line breaks, which a template that trims them loses.
    """
    tokens = _special_tokens(folder)
    for messages in _PROBES:
        for first in ([], [_SYSTEM]):
            rendered = _render_bare(template, [*first, *messages], tokens)
            if rendered is None and first:
                continue  # older ones refuse a system message
            if rendered is None or not re.fullmatch(_mistral_pattern([*first, *messages], version), rendered):
                return False
    return True


_SYSTEM = {"role": "system", "content": "\nA system's\n\tprompt\n"}
_USERS = [{"role": "user", "content": f"\nA user's  {word}\n\n\tturn\n"} for word in ("first", "second", "third")]
_ANSWERS = [{"role": "assistant", "content": f"\nAn  {word}\n\nanswer\n"} for word in ("early", "late")]
_PROBES = (
    _USERS[:1],
    [_USERS[0], _ANSWERS[0], _USERS[1]],
    [_USERS[0], _ANSWERS[0], _USERS[1], _ANSWERS[1], _USERS[2]],
)


def _mistral_pattern(messages: list[dict[str, str]], version: int) -> str:
    """A regex of what mistral-common writes. The system's text begins the first user turn in v1, the last in v3. In
    answers v3 drops spaces at the end; the templates published for it trim all white space there.
    """
    turns = [message for message in messages if message["role"] != "system"]
    system = "".join(message["content"] + "\n\n" for message in messages if message["role"] == "system")
    place = 0 if version == 1 else len(turns) - 1
    pattern = "<s> ?"
    for index, turn in enumerate(turns):
        text = re.escape((system if index == place else "") + turn["content"])
        if turn["role"] == "user":
            pattern += rf"\[INST\] ?{text} ?\[/INST\] ?"
        elif version == 1:
            pattern += f"{text} ?</s> ?"
        else:
            pattern += f"(?:{text}|{re.escape(turn['content'].strip())}) ?</s> ?"
    return pattern


def _special_tokens(folder: Path) -> dict[str, str]:
    """The names of special tokens that a template of the folder can print, as transformers reads them."""
    config = read_model_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read_model_json(folder / "special_tokens_map.json")
    values = {name: value for name, value in config.items() if name.endswith("_token")}
    return {name: _content(value) for name, value in values.items() if isinstance(value, str | dict)}


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token.get("content", ""))


def _render_bare(template: str, messages: list[dict[str, str]], tokens: Mapping[str, str]) -> str | None:
    """What the template writes; None where it fails, as one does that uses more than transformers' common features."""
    environment = CountedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = _raise_exception
    variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **tokens}
    try:
        return counted(lambda: environment.from_string(template).render(variables))
    except Exception:
        return None


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
