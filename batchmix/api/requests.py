"""The prompts of a call as rows of the pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from batchmix.records import InputRow
from batchmix.templates.messages import PromptError, check_text

_KEYS = "a prompt has prompt or prompt_token_ids"


def as_prompts(prompts: Any) -> list[Any]:
    """The prompts of a call of `generate`, one of which may be given by itself."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    found = listed(prompts)
    if isinstance(found, bytes | bytearray) or not isinstance(found, Iterable):
        raise TypeError(
            f"prompts must be text, token ids, a dict of one of them, or several of these, not {_kind(prompts)}"
        )
    is_token_ids = isinstance(found, list) and found and all(type(item) is int for item in found)
    return [found] if is_token_ids else list(found)


def as_conversations(messages: Any) -> list[Any]:
    """The conversations of a call of `chat`, one of which may be given by itself."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise TypeError(f"messages must be a list of {{role, content}}, or several of these, not {_kind(messages)}")
    found = list(messages)
    return [found] if found and isinstance(found[0], Mapping) else found


def listed(value: Any) -> Any:
    """An array, a tensor, a Series or another sequence that is no text as a list; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | list):
        return list(value)
    return value


def prompt_row(number: int, prompt: Any, sampling: Mapping[str, Any]) -> tuple[InputRow, str | None]:
    """The row of a prompt of `generate`, and the text that it shows. A text is never put into a chat template. What cannot
    be run has its reason in `error`."""
    text, ids = prompt, None
    if isinstance(prompt, Mapping):
        text, ids = prompt.get("prompt"), listed(prompt.get("prompt_token_ids"))
        others = [key for key in prompt if key not in ("prompt", "prompt_token_ids") and prompt[key] is not None]
        if others:
            return _failed(number, f"prompt: remove the key {others[0]}; {_KEYS}"), None
        if text is None and ids is None:
            return _failed(number, f"prompt is a mapping without a prompt; {_KEYS}"), None
    elif not isinstance(prompt, str):
        text, ids = None, listed(prompt)
        if not isinstance(ids, list):
            return _failed(number, f"a prompt is a text, token ids or a mapping, not {_kind(prompt)}"), None
    shown = text if isinstance(text, str) else None
    if ids is not None:
        return InputRow(number, str(number), {"prompt_token_ids": ids}, sampling), shown
    try:
        if not check_text(text, "prompt"):
            raise PromptError("prompt is empty")
    except PromptError as error:
        return _failed(number, str(error)), shown
    return InputRow(number, str(number), {}, sampling, text=shown), shown


def chat_row(
    number: int, messages: Any, sampling: Mapping[str, Any], continue_final_message: bool
) -> tuple[InputRow, str | None]:
    """The row of a conversation of `chat`. Its messages, and the parts of a content, are any sequences."""
    messages = listed(messages)
    if isinstance(messages, list):
        messages = [_with_listed_content(message) for message in messages]
    if continue_final_message:
        last = messages[-1] if isinstance(messages, list) and messages else None
        if not isinstance(last, Mapping) or last.get("role") != "assistant":
            return _failed(number, "continue_final_message: the last message is not the assistant's"), None
        messages = [*messages[:-1], {**last, "prefix": True}]
    return InputRow(number, str(number), {"messages": messages}, sampling), None


def _with_listed_content(message: Any) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if content is None or isinstance(content, str):
        return message
    return {**message, "content": listed(content)}


def _failed(number: int, error: str) -> InputRow:
    return InputRow(number, str(number), {}, error=error)


def _kind(value: Any) -> str:
    return type(value).__name__
