"""The tokenizer as a user of transformers expects it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchmix.api.requests import as_conversations, chat_row
from batchmix.prompts.tokenizer import Tokenizer
from batchmix.templates.chat_template import TemplateOptions
from batchmix.templates.messages import PromptError, check_text, parse_messages


class LLMTokenizer:
    """The model's tokenizer, as the engine has it: a text never becomes control tokens, whatever strings are in it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    @property
    def bos_token_id(self) -> int | None:
        return self._tokenizer.bos_id

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that the tokenizer puts around every text unless `add_special_tokens` is False."""
        [ids] = self._tokenizer.encode_texts([_checked(check_text, text, "text")])
        found = _ids(ids)
        if add_special_tokens:
            return found
        around = {self.bos_token_id, self.eos_token_id}
        first = 1 if found and found[0] in around else 0
        return found[first : len(found) - (len(found) > first and found[-1] in around)]

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self._tokenizer.decode([ids], skip_special_tokens)[0]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The conversation as token ids, as `LLM.chat` gives them to the model. ValueError where it cannot be rendered."""
        if not tokenize:
            raise ValueError("apply_chat_template: tokenize=False is not there, since a text does not say which of its marks are"
                             " control tokens; give the token ids to generate, and look at them with decode(ids)")  # fmt: skip
        if not self._tokenizer.chat_format.chats:
            raise ValueError(f"there is no chat template ({self._tokenizer.chat_format.name}); give chat_template")
        options = TemplateOptions(add_generation_prompt, list(tools) if tools else None, variables)
        [messages] = as_conversations(conversation)
        row, _ = chat_row(0, messages, {}, continue_final_message)
        if row.error is not None:
            raise ValueError(row.error)
        chat = _checked(parse_messages, row.columns["messages"], "messages")
        [ids] = self._tokenizer.with_options(options).encode_chats([chat])
        return _ids(ids)


def _checked(check: Any, *values: Any) -> Any:
    try:
        return check(*values)
    except PromptError as error:
        raise ValueError(str(error)) from None


def _ids(ids: Sequence[int] | PromptError) -> list[int]:
    if isinstance(ids, PromptError):
        raise ValueError(str(ids))
    return list(ids)
