"""A conversation as it comes from data, checked once and turned into plain text turns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JOINER = "\n\n"  # between text parts of one message and between merged messages, as in mistral-common
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class PromptError(Exception):
    """Why one row cannot become a prompt: one line that says what is wrong and where."""


@dataclass(slots=True, frozen=True)
class Message:
    """One turn. `parts` is empty only where the content is `""` or `[]`; a list of empty parts is not."""

    role: str  # system, user or assistant
    parts: tuple[str, ...]
    prefix: bool = False  # the model continues this assistant turn
    where: str = ""  # for error messages: "messages[2] (user)"
    name: str | None = None  # of who speaks, for templates that write it

    @property
    def text(self) -> str:
        """The non-empty parts, joined."""
        return JOINER.join(filter(None, self.parts))


def parse_messages(value: object, column: str) -> list[Message]:
    """The conversation in `value`, a list of {role, content} (ShareGPT: {from, value}) or the JSON text of one.

    Keys that say nothing about the text are ignored; a `name` does where the chat format writes it. PromptError where it
    is not a conversation that ends with a turn to answer or, marked with `"prefix": true`, an assistant's turn to continue.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise PromptError(f"{column} is text but not JSON: {error}") from None
        except RecursionError:
            raise PromptError(f"{column} is text that is nested too deeply to be JSON") from None
    if not isinstance(value, list | tuple):
        raise PromptError(f"{column} must be a list of {{role, content}}, not {type(value).__name__}")
    if not value:
        raise PromptError(f"{column} is empty")
    messages = [_parse_message(message, f"{column}[{index}]") for index, message in enumerate(value)]
    for message in messages[:-1]:
        if message.prefix:
            raise PromptError(f"{message.where}: only the last message can have prefix=true")
    last = messages[-1]
    if last.role == "assistant" and not last.prefix:
        raise PromptError(
            f'{last.where}: nothing left to answer; leave this turn out, or give it "prefix": true to have it continued'
        )
    return messages


def check_text(text: object, where: str) -> str:
    """`text` if it is a string that can be encoded; PromptError otherwise."""
    if not isinstance(text, str):
        raise PromptError(f"{where} must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise PromptError(f"{where} is not valid Unicode: lone surrogate U+{code:04X} at {error.start}") from None
    return text


def _parse_message(message: object, where: str) -> Message:
    if isinstance(message, list) and message and all(isinstance(item, tuple) for item in message):
        message = dict(message)  # of a column of Arrow maps
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} must be an object with role and content, not {type(message).__name__}")
    is_sharegpt = message.get("role") is None and message.get("from") is not None
    given, roles = (message["from"], _SHAREGPT_ROLES) if is_sharegpt else (message.get("role"), _ROLES)
    role = roles.get(given) if isinstance(given, str) else None
    if role is None:
        named = "from" if is_sharegpt else "role"
        raise PromptError(f"{where}: {named} {given!r} is not one of {', '.join(dict.fromkeys(roles))}")
    where = f"{where} ({given})"
    if message.get("tool_calls") or message.get("function_call"):
        raise PromptError(f"{where}: tool calls are not supported")
    name = message.get("name")
    if name is not None:
        check_text(name, f"{where}: name")
    prefix = role == "assistant" and message.get("prefix")
    if prefix not in (None, True, False):
        raise PromptError(f"{where}: prefix must be true or false, not {prefix!r}")
    content = message.get("value" if is_sharegpt else "content")
    parts: tuple[str, ...]
    if isinstance(content, str):
        parts = (check_text(content, where),) if content else ()
    elif isinstance(content, list | tuple):
        parts = tuple(_parse_part(part, f"{where}, part {index}") for index, part in enumerate(content))
    elif content is None:
        raise PromptError(f"{where}: no content")
    else:
        raise PromptError(f"{where}: content must be text or a list of text parts, not {type(content).__name__}")
    return Message(role, parts, bool(prefix), where, name)


def _parse_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise PromptError(f"{where}: only parts of type 'text' can be used, not {kind!r}")
    return check_text(part.get("text"), where)
