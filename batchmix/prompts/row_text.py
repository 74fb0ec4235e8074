"""What a row says to the model, before it is tokens: a conversation for the chat template, or a text as it is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.input.prompt_columns import PromptColumns, value_of_column
from batchmix.prompts.tokenizer import Tokenizer
from batchmix.records import InputRow
from batchmix.templates.messages import Message, PromptError, check_text, parse_messages
from batchmix.templates.template import RowTemplate

# Of Mistral's, ChatML's, Llama's, Zephyr's, Gemma's and Alpaca's templates.
MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>",
         "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>", "### Instruction:")  # fmt: skip
_log = logging.getLogger(__name__)


class NoChatFormat(PromptError):
    """A row of a kind for which the model folder names no chat template; so is every other row of that kind."""


class RowTexts:
    """`of(row)` is its conversation or text; one warning in all for a text that holds a template's marks already.

    BatchmixError where data.template or a system prompt cannot work with this tokenizer.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer) -> None:
        self._data, self._tokenizer, self._format = data, tokenizer, tokenizer.chat_format
        self._columns = PromptColumns.of(data)
        self.template = None if data.template is None else RowTemplate(data.template)
        self._system = RowTemplate(data.system_prompt, "data.system_prompt", True) if data.system_prompt else None
        self.warns = True
        if self.template is not None and self._format.prompts is None:
            raise BatchmixError(f"data.template: {_UNDECIDED}")
        for key in ("system_prompt", "system_prompt_column"):
            if getattr(data, key) and not self._format.chats:
                raise BatchmixError(
                    f"data.{key}: without a chat template ({self._format.name}) there are no system messages; put the text"
                    " into data.template, or set data.chat_template"
                )

    def of(self, row: InputRow) -> list[Message] | str:
        """PromptError where the row has neither a conversation nor a text that can be sent."""
        content = self._content(row)
        if self.warns:
            self._warn_of_marks(row, content)
        return content

    def _content(self, row: InputRow) -> list[Message] | str:
        named, columns = self._columns, row.columns
        if self.template is not None:
            text = self.template.render(columns)
        elif row.text is not None:
            return self._request_text(row.text)
        elif named.messages is not None and (messages := value_of_column(columns, named.messages)) is not None:
            if not self._format.chats:
                raise NoChatFormat(
                    f"{named.messages}: messages need a chat template, and there is none (data.chat_template:"
                    f" {self._format.name}); set data.chat_template=mistral or to a Jinja file, or give a prompt instead"
                )
            return self._with_system(parse_messages(messages, named.messages), columns)
        elif named.prompt is not None and (prompt := value_of_column(columns, named.prompt)) is not None:
            text = check_text(prompt, named.prompt)
            if not text:
                raise PromptError(f"{named.prompt} is empty")
            if self._format.prompts is None:
                raise NoChatFormat(f"{named.prompt}: {_UNDECIDED}")
        else:
            raise PromptError(f"no prompt: columns {', '.join(map(repr, named.names))} are null or missing")
        return self._with_system([Message("user", (text,))], columns) if self._format.prompts else text

    def _request_text(self, text: str) -> str:
        if self._data.system_prompt:
            raise PromptError("data.system_prompt: a request to /v1/completions has no system message")
        if not text:
            raise PromptError("body.prompt is empty")
        return check_text(text, "body.prompt")

    def _with_system(self, messages: list[Message], columns: Mapping[str, Any]) -> list[Message]:
        if any(message.role == "system" for message in messages):
            return messages
        name = self._data.system_prompt_column
        if name is not None and (value := value_of_column(columns, name)) is not None:
            text, where = check_text(value, name), name
        elif self._system is not None:
            text, where = self._system.render(columns), "data.system_prompt"
        else:
            return messages
        return [Message("system", (text,), where=where), *messages] if text else messages

    def _warn_of_marks(self, row: InputRow, content: list[Message] | str) -> None:
        """Text that was rendered before gets its marks twice, or has control tokens in it that are encoded as text."""
        raw = isinstance(content, str)
        texts = [content] if isinstance(content, str) else [message.text for message in content]
        texts = [text for text in texts if "<" in text or "[" in text or "#" in text]  # most have none
        marks = (*MARKS, "<s>", "</s>") if raw else MARKS  # in a message, <s> is more likely HTML
        found = [mark for mark in marks if any(mark in text for text in texts)] if texts else []
        if raw and found:
            pieces = zip(self._tokenizer.token_bytes(True), self._tokenizer.token_bytes(False), strict=True)
            control = {piece.decode(errors="replace") for text, piece in pieces if not text}
            found = [mark for mark in found if mark in control]
        if found:
            self.warns = False
            what = (
                "which is encoded as text, not as the control token; give messages (LLM.chat in Python), and leave the marks to"
                " data.chat_template, or give token ids"
                if raw
                else "the marks of a chat template, which data.chat_template adds itself; if the texts are rendered already,"
                " set data.chat_template=none, or give them as prompt_token_ids"
            )
            _log.warning("row %d: its text holds %s, %s (said once)", row.row, found[0], what)


_UNDECIDED = (
    "this model folder (params.json, no chat template) does not say whether it is a base model; set data.chat_template=mistral"
    " to send prompts as user messages, or data.chat_template=none to encode them as they are"
)
