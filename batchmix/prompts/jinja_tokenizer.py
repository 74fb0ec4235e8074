"""Tokenizers of fine-tunes: transformers' own, with the model folder's Jinja chat template.

The ids equal `apply_chat_template` as long as no text contains a control token's string. Where one does, only the
control tokens that the template itself writes count: in the text they are hidden while the template runs, then the
template's are replaced by aliases, private tokens that no text can contain, and a copy of the tokenizer that knows the
aliases but takes the control strings for text encodes the whole. So spaces and merges around them come out as usual.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta
from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from batchmix.errors import BatchmixError
from batchmix.prompts.vocabulary import TokenIds, Vocabulary
from batchmix.templates.chat_template import ChatFormat, TemplateOptions
from batchmix.templates.counted_jinja import count_steps_of, counted
from batchmix.templates.messages import Message, PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBE_TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class _Marked:
    """A rendered conversation with the template's control tokens as aliases, and those of the texts as text."""

    text: str


class JinjaTokenizer:
    """A fast transformers tokenizer. Without a chat template it can only encode plain texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat_format: ChatFormat) -> None:
        self._tokenizer = tokenizer
        self.chat_format = chat_format
        self._options = TemplateOptions()
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self._full = Backend.from_str(tokenizer.backend_tokenizer.to_str())
        self._full.no_truncation()
        self._full.no_padding()
        spec = json.loads(self._full.to_str())
        added: dict[int, AddedToken] = self._full.get_added_tokens_decoder()
        template = tokenizer.get_chat_template() if self.chat_format.chats else ""
        probe = self._probe()
        special = {token for token, entry in added.items() if entry.special}
        marks = {token: entry.content for token, entry in added.items() if not _is_plain(entry.content)}
        turn_marks = special | {token for token, content in marks.items() if content in probe}
        control = turn_marks | {token for token, content in marks.items() if content in template}
        self._vocabulary = _read_vocabulary(self._full, spec["decoder"], added, turn_marks)
        self.vocab_size = len(self._vocabulary.text)
        self.drops_leading_space = self._vocabulary.drops_leading_space

        longest_first = sorted((added[token].content for token in control), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # A normaliser can turn other text into such a control token, which a search for its string does not find.
        self._always_hide = any(added[token].normalized for token in control)
        nonce = secrets.token_hex(16)
        self._hidden = {added[token].content: f"bm{nonce}h{token}e" for token in control}
        self._shown = {hidden: content for content, hidden in self._hidden.items()}
        self._hidden_pattern = re.compile(f"bm{nonce}h[0-9]+e")
        self._aliases = {added[token].content: f"bm{nonce}a{token}e" for token in control}

        for entry in spec["added_tokens"]:
            entry["special"] |= entry["id"] in control
        self._plain = Backend.from_str(json.dumps(spec))
        self._plain.encode_special_tokens = True  # in texts they are text; the aliases are not special
        self._plain.add_tokens([_renamed(added[token], self._aliases[added[token].content]) for token in control])
        self._control_ids = control
        self._real = {self._plain.token_to_id(self._aliases[added[token].content]): token for token in control}

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> list[TokenIds | PromptError]:
        """The prompt of each conversation, or why it has none."""
        rendered = [self._render_chat(chat) for chat in chats]
        usual = iter(
            self._full.encode_batch_fast([item for item in rendered if type(item) is str], add_special_tokens=False)
        )
        marked = self._encode_plain([item.text for item in rendered if isinstance(item, _Marked)], False)
        prompts: list[TokenIds | PromptError] = []
        for item in rendered:
            if isinstance(item, PromptError):
                prompts.append(item)
            elif isinstance(item, _Marked):
                prompts.append(next(marked))
            else:
                prompts.append(array("i", next(usual).ids))
        return prompts

    def with_options(self, options: TemplateOptions) -> JinjaTokenizer:
        """The same, telling its template `options`. BatchmixError for what the template does not read, which would be lost
        silently, and for control tokens in it."""
        template = self._compiled()
        read = jinja2.meta.find_undeclared_variables(template.environment.parse(self._tokenizer.get_chat_template()))
        given = dict(options.variables) | ({"tools": options.tools} if options.tools else {})
        for name, value in given.items():
            if name not in read:
                raise BatchmixError(f"{name}: {self.chat_format.origin} does not read it")
            if found := self._control.search(json.dumps(value, ensure_ascii=False, default=str)):
                raise BatchmixError(f"{name}: has the text {found[0]}, which is a control token of the model")
        other = copy.copy(self)
        other._options = options
        return other

    def _compiled(self) -> jinja2.Template:
        """The template as transformers has compiled it, and keeps it; its work is counted."""
        from transformers.utils import chat_template_utils

        source = self._tokenizer.get_chat_template()
        template: jinja2.Template = chat_template_utils._compile_jinja_template(source)
        count_steps_of(template, source)
        return template

    def encode_texts(self, texts: Sequence[str]) -> list[TokenIds | PromptError]:
        """Each text as it is, with the tokens that the tokenizer puts around every text."""
        return list(self._encode_plain(texts, True))

    def decode(self, batch: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The text of each list of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._vocabulary.decode(batch, skip_special_tokens)

    def token_bytes(self, skip_special_tokens: bool = True) -> list[bytes]:
        """The bytes that each token contributes to the text, [vocab_size]."""
        return self._vocabulary.pieces(skip_special_tokens)

    def _render(self, turns: list[dict[str, str]], prefix: bool) -> str:
        options = self._options
        try:
            self._compiled()
            text = counted(
                lambda: self._tokenizer.apply_chat_template(
                    turns,
                    tokenize=False,
                    add_generation_prompt=options.add_generation_prompt and not prefix,
                    continue_final_message=prefix,
                    tools=options.tools,
                    **options.variables,
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise BatchmixError(f"{self.chat_format.origin} is broken, line {error.lineno}: {error.message}") from None
        except Exception as error:
            raise PromptError(f"{self.chat_format.origin} refuses this row: {_one_line(error)}") from None
        assert isinstance(text, str)
        return text

    def _render_chat(self, chat: Sequence[Message]) -> str | _Marked | PromptError:
        try:
            self._check_names(chat)
            texts = (text for message in chat for text in (message.text, message.name or ""))
            if self._always_hide or any(map(self._control.search, texts)):
                return self._render_hidden(chat)
            return self._render(_turns(chat), chat[-1].prefix)
        except PromptError as error:
            return error

    def _check_names(self, chat: Sequence[Message]) -> None:
        """PromptError where the template does not write the names of a role's messages: they would be lost silently."""
        for role in {message.role for message in chat if message.name}:
            bare = [replace(message, name=None) if message.role == role else message for message in chat]
            try:
                unchanged = self._render(_turns(bare), chat[-1].prefix) == self._render(_turns(chat), chat[-1].prefix)
            except PromptError:
                continue  # with names, the template has refused the row, as it will below; or it needs them
            if unchanged:
                where = next(message.where for message in chat if message.role == role and message.name)
                raise PromptError(f"{where}: the model's chat template does not write its name; take it out")

    def _render_hidden(self, chat: Sequence[Message]) -> _Marked:
        turns = _turns(chat)
        for turn in turns:
            for key in turn.keys() - {"role"}:
                turn[key] = self._control.sub(lambda match: self._hidden[match[0]], turn[key])
        rendered = self._render(turns, chat[-1].prefix)
        rendered = self._control.sub(lambda match: self._aliases[match[0]], rendered)
        return _Marked(self._hidden_pattern.sub(lambda match: self._shown[match[0]], rendered))

    def _encode_plain(self, texts: Sequence[str], add_special_tokens: bool) -> Iterator[TokenIds | PromptError]:
        for encoding in self._plain.encode_batch(list(texts), add_special_tokens=add_special_tokens):
            yield self._forged(encoding) or array("i", [self._real.get(token, token) for token in encoding.ids])

    def _forged(self, encoding: Encoding) -> PromptError | None:
        """Vocabularies that are looked up by the word can hold a control token's string as a word of its own."""
        for token, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if token in self._control_ids and not added:
                return PromptError(f"the tokenizer cannot encode {self._plain.id_to_token(token)!r} as text")
        return None

    def _probe(self) -> str:
        """What the template writes around turns, with and without a system message."""
        rendered = ""
        for turns in ([*_PROBE_TURNS, _PROBE_TURNS[0]], [{"role": "system", "content": "s"}, _PROBE_TURNS[0]]):
            try:
                rendered += self._render(turns, False) if self.chat_format.chats else ""
            except PromptError:
                continue  # many templates refuse a system message
        return rendered


def _turns(chat: Sequence[Message]) -> list[dict[str, str]]:
    return [
        {"role": message.role, "content": message.text} | ({} if message.name is None else {"name": message.name})
        for message in chat
    ]


def _is_plain(content: str) -> bool:
    """Words and white space that a tokenizer has as added tokens are text, also where a template writes them."""
    return content.isalnum() or content.isspace()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _renamed(token: AddedToken, content: str) -> AddedToken:
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=False,
    )


def _read_vocabulary(
    backend: Backend, decoder: dict[str, Any] | None, added: dict[int, AddedToken], turn_marks: set[int]
) -> Vocabulary:
    """Text bytes of each token, as the tokenizer's decoder makes them."""
    kinds = {part["type"] for part in _decoder_parts(decoder)}
    if "ByteLevel" in kinds:
        to_bytes, drops = _byte_level, False
    elif kinds & {"Metaspace", "ByteFallback"}:
        to_bytes, drops = _sentencepiece, any(_drops_leading_space(part) for part in _decoder_parts(decoder))
    else:
        raise BatchmixError(
            f"tokenizer.json: decoder {sorted(kinds)} is not supported; byte-level and SentencePiece decoders are"
        )
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    text = [b""] * size
    for piece, token in backend.get_vocab(with_added_tokens=False).items():
        text[token] = to_bytes(piece)
    for token, entry in added.items():
        text[token] = entry.content.encode()
    control = {token: text[token] for token in turn_marks}
    for token in turn_marks:
        text[token] = b""
    return Vocabulary(text, control, drops)


def _decoder_parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _drops_leading_space(part: dict[str, Any]) -> bool:
    if part["type"] == "Metaspace":
        return bool(part["prepend_scheme"] != "never")
    return bool(part["type"] == "Strip" and part["content"] == " " and part["start"])


def _sentencepiece(piece: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


def _byte_level(piece: str) -> bytes:
    return bytes(map(_BYTE_OF.__getitem__, piece))


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 characters stand for themselves, the other bytes follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
