"""Mistral's SentencePiece tokenizers and instruct formats, v1 (Mixtral 8x7B) and v3 (8x22B).

The reference is mistral-common: the ids equal those of its `encode_chat_completion` for every conversation that it
accepts, and what it refuses is a PromptError. Only the way there differs: a conversation becomes text segments and
control ids, and the segments of many conversations are encoded in one call, which runs without the interpreter lock.
Control tokens are only ever added as ids: SentencePiece encodes `</s>` in a text as text.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from batchmix.errors import BatchmixError
from batchmix.prompts.vocabulary import TokenIds, Vocabulary
from batchmix.templates.chat_template import ChatFormat, TemplateOptions
from batchmix.templates.messages import JOINER, Message, PromptError

_Segment = str | int  # text to encode, or a control token


class MistralTokenizer:
    """`tokenizer.model` with the instruct format that its vocabulary has: v3 where `[INST]` is a token, else v1."""

    def __init__(self, path: Path, num_threads: int) -> None:
        self._model = SentencePieceProcessor(model_file=str(path))
        self._num_threads = num_threads
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        begin, end = self._model.piece_to_id("[INST]"), self._model.piece_to_id("[/INST]")
        unknown = self._model.unk_id()
        self._inst = None if unknown in (begin, end) else (begin, end)
        self.version = 1 if self._inst is None else 3
        self.chat_format = ChatFormat(f"Mistral's v{self.version}")
        self._vocabulary = _read_vocabulary(self._model)
        self.drops_leading_space = self._vocabulary.drops_leading_space

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> list[TokenIds | PromptError]:
        """The prompt of each conversation, or why it has none."""
        rendered: list[list[_Segment] | PromptError] = []
        for chat in chats:
            try:
                rendered.append(self._render(chat))
            except PromptError as error:
                rendered.append(error)
        return self._encode(rendered)

    def encode_texts(self, texts: Sequence[str]) -> list[TokenIds | PromptError]:
        """Each text as it is, after a beginning-of-sequence token."""
        return self._encode([[self.bos_id, text] for text in texts])

    def with_options(self, options: TemplateOptions) -> MistralTokenizer:
        """Itself: Mistral's turns need no generation prompt. BatchmixError for tools and variables."""
        for name in ["tools"] * bool(options.tools) + list(options.variables):
            raise BatchmixError(f"{name}: Mistral's chat format, as this model has it, has no place for it; write it into"
                                " a message, or give a Jinja chat template that reads it")  # fmt: skip
        return self

    def decode(self, batch: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The text of each list of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._vocabulary.decode(batch, skip_special_tokens)

    def token_bytes(self, skip_special_tokens: bool = True) -> list[bytes]:
        """The bytes that each token contributes to the text, [vocab_size]."""
        return self._vocabulary.pieces(skip_special_tokens)

    def has_pieces(self, vocabulary: Mapping[str, int]) -> bool:
        """Whether it has these pieces under these ids, and no others."""
        model = self._model
        return len(vocabulary) == self.vocab_size and all(
            model.id_to_piece(token) == piece for piece, token in vocabulary.items() if token < self.vocab_size
        )

    def _encode(self, rendered: Sequence[list[_Segment] | PromptError]) -> list[TokenIds | PromptError]:
        texts = [part for item in rendered if isinstance(item, list) for part in item if isinstance(part, str)]
        encoded = iter(self._model.encode(texts, num_threads=self._num_threads))
        prompts: list[TokenIds | PromptError] = []
        for item in rendered:
            if isinstance(item, PromptError):
                prompts.append(item)
                continue
            ids = array("i")
            for part in item:
                if isinstance(part, str):
                    ids.extend(next(encoded))
                else:
                    ids.append(part)
            prompts.append(ids)
        return prompts

    def _render(self, chat: Sequence[Message]) -> list[_Segment]:
        turns = _merge_turns(chat)
        users = [index for index, turn in enumerate(turns) if turn.role == "user"]
        system = JOINER.join(message.text for message in chat if message.role == "system" and message.parts)
        system_turn = users[0] if self._inst is None else users[-1]
        segments: list[_Segment] = [self.bos_id]
        for index, turn in enumerate(turns):
            text = turn.text
            if turn.role == "user":
                if system and index == system_turn:
                    text = system + JOINER + text
                if self._inst is None:
                    segments.append(f"[INST] {text} [/INST]")
                else:
                    segments += (self._inst[0], text, self._inst[1])
                continue
            if not text:
                raise PromptError(f"{turn.where}: an assistant's turn cannot be empty")
            segments.append(text if self._inst is None else text.rstrip(" "))
            if not turn.prefix:
                segments.append(self.eos_id)
        return segments


def _merge_turns(chat: Sequence[Message]) -> list[Message]:
    """User and assistant turns, neighbours of one role merged; the first is the user's, empty if need be."""
    turns: list[Message] = []
    previous = ""
    for message in chat:
        if message.name:
            raise PromptError(f"{message.where}: Mistral's chat format has no place for a name; take it out")
        if message.role == "system" and previous == "assistant":
            raise PromptError(f"{message.where}: a system message cannot follow an assistant's")
        if message.role == "assistant" and not message.parts:
            raise PromptError(f"{message.where}: an assistant's turn cannot be empty")
        if message.role == previous != "system":
            merged = turns[-1].parts + message.parts
            turns[-1] = Message(message.role, merged, message.prefix, message.where)
        elif message.role != "system":
            turns.append(message)
        previous = message.role
    if len(chat) == 1 and previous == "assistant":
        raise PromptError(f"{chat[0].where}: a conversation cannot consist of an assistant's turn alone")
    if not turns or turns[0].role != "user":
        turns.insert(0, Message("user", ()))
    return turns


def _read_vocabulary(model: SentencePieceProcessor) -> Vocabulary:
    """Text bytes of each piece: U+2581 is a space, `<0xE2>` a byte, control and unknown tokens nothing."""
    text: list[bytes] = []
    control: dict[int, bytes] = {}
    for token in range(model.vocab_size()):
        piece: str = model.id_to_piece(token)
        if model.is_control(token) or model.is_unknown(token):
            control[token] = piece.encode()
            text.append(b"")
        elif model.is_byte(token):
            text.append(bytes([int(piece[1:-1], 16)]))
        else:
            text.append(piece.replace("\u2581", " ").encode())
    return Vocabulary(text, control, drops_leading_space=True)
