"""Text to token ids and back, for whatever tokenizer the model folder has."""

from __future__ import annotations

import hashlib
import importlib.resources
import os
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from batchmix.errors import BatchmixError
from batchmix.prompts.vocabulary import MAX_VOCABULARY, TokenIds
from batchmix.templates.chat_template import (
    AUTO,
    MISTRAL,
    NONE,
    ChatFormat,
    TemplateOptions,
    folder_templates,
    is_jinja,
    read_model_json,
    writes_mistral,
)
from batchmix.templates.messages import Message, PromptError

if TYPE_CHECKING:
    from batchmix.prompts.mistral_tokenizer import MistralTokenizer

BUILT_IN = {"mistral-v1": "tokenizer.model.v1"}  # config.json's batchmix_tokenizer -> file of mistral-common
_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "additional_chat_templates/*.jinja")
_SENTENCEPIECE_FILES = ("tokenizer.model.v3", "tokenizer.model", "tokenizer.model.v1")
_SHIPPED_FILES = ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3")  # with mistral-common
_MISTRAL_SIZES = (32_000, 32_768)  # of those
_DEFAULT_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_MAX_THREADS = 8  # encoding beyond this outruns the reader


class Tokenizer(Protocol):
    """Text is always encoded as text: no string in it becomes a control token."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def chat_format(self) -> ChatFormat:
        """How messages and plain prompts become text."""

    @property
    def drops_leading_space(self) -> bool:
        """Whether one space at the start of a text's bytes is not part of the text (SentencePiece)."""

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> list[TokenIds | PromptError]:
        """The prompt of each conversation, ready for the answer, or why it has none."""

    def with_options(self, options: TemplateOptions) -> Tokenizer:
        """The same, telling its chat template `options`. BatchmixError where the template has no use for them."""

    def encode_texts(self, texts: Sequence[str]) -> list[TokenIds | PromptError]:
        """Each text as it is, after a beginning-of-sequence token where the model has one."""

    def decode(self, batch: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The text of each list of token ids; bytes that are not UTF-8 become U+FFFD."""

    def token_bytes(self, skip_special_tokens: bool = True) -> list[bytes]:
        """The bytes that each token contributes to the text, [vocab_size]; b"" for control tokens if skipped."""


def vocabulary_bytes(tokenizer: Tokenizer, vocab_size: int, skip_special_tokens: bool = True) -> list[bytes]:
    """`token_bytes` of a model's vocabulary, which may be larger or smaller than the tokenizer's."""
    pieces = tokenizer.token_bytes(skip_special_tokens)[:vocab_size]
    return pieces + [b""] * (vocab_size - len(pieces))


def load_tokenizer(folder: Path, chat_template: str = AUTO) -> Tokenizer | None:
    """The tokenizer of a model folder; None where it has none, and then only token ids can be prompts.

    `chat_template` is data.chat_template, a file's text already read. `auto`: a folder whose template writes Mistral's
    turns has them from Mistral's SentencePiece tokenizer, as mistral-common has; one with another template has
    transformers' tokenizer and exactly that template; one without is a base model's, and its prompts are plain texts.
    A folder in Mistral's own layout does not say: messages are rendered as Mistral's, and plain prompts are refused.
    """
    name = read_model_json(folder / "config.json").get("batchmix_tokenizer")
    if name is not None:
        return _load_built_in(folder, name, chat_template)
    mistral = _open_mistral(folder)
    if mistral is None and not (folder / "tokenizer.json").is_file() and not _sentencepiece_files(folder):
        return None
    if chat_template == AUTO:
        return _load_auto(folder, mistral)
    if chat_template == NONE:
        return _load_base(folder, mistral, ChatFormat("none (data.chat_template=none)", False, False))
    if is_jinja(chat_template):
        as_given = ChatFormat("Jinja of data.chat_template", origin="data.chat_template")
        return _load_transformers(folder, as_given, chat_template)
    if chat_template != MISTRAL:
        return _load_named(folder, chat_template)
    if mistral is None:
        raise BatchmixError(
            f"data.chat_template=mistral: the vocabulary in {folder} is not Mistral's; give the template as Jinja"
        )
    mistral.chat_format = ChatFormat(f"Mistral's v{mistral.version} (data.chat_template=mistral)")
    return mistral


def _load_auto(folder: Path, mistral: MistralTokenizer | None) -> Tokenizer:
    templates = folder_templates(folder)
    if templates and "default" not in templates:
        raise BatchmixError(
            f"{folder}: of its chat templates ({', '.join(map(repr, templates))}) none is called 'default';"
            " name one with data.chat_template"
        )
    if templates:
        if mistral is not None and writes_mistral(templates["default"], folder, mistral.version):
            mistral.chat_format = ChatFormat(f"Mistral's v{mistral.version}, which the model folder's own writes too")
            return mistral
        return _load_transformers(folder, ChatFormat("the model folder's own"), templates["default"])
    if mistral is not None and _is_mistral_layout(folder):
        name = f"Mistral's v{mistral.version} for messages; plain prompts need data.chat_template (params.json folder)"
        mistral.chat_format = ChatFormat(name, prompts=None)
        return mistral
    return _load_base(folder, mistral, ChatFormat("none, the model folder has none (a base model)", False, False))


def _load_named(folder: Path, name: str) -> Tokenizer:
    templates = folder_templates(folder)
    if name not in templates:
        raise _no_such_template(folder, name, templates)
    return _load_transformers(folder, ChatFormat(f"the model folder's {name!r}"), templates[name])


def _no_such_template(folder: Path, given: str, templates: Mapping[str, str]) -> BatchmixError:
    there = f"its templates are called {', '.join(templates)}" if templates else "it has none"
    return BatchmixError(
        f"data.chat_template={given}: must be auto, none, mistral, a Jinja file, Jinja text or the name of a template of"
        f" {folder}; {there}"
    )


def tokenizer_fingerprint(folder: Path) -> str:
    """Sha256 over the files that the tokenizer and the chat format of a model folder come from."""
    digest = hashlib.sha256(str(read_model_json(folder / "config.json").get("batchmix_tokenizer")).encode())
    for path in sorted(path for pattern in _FILES for path in folder.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _load_built_in(folder: Path, name: object, chat_template: str) -> Tokenizer:
    if name not in BUILT_IN:
        raise BatchmixError(f"{folder / 'config.json'}: batchmix_tokenizer={name!r}: must be one of {[*BUILT_IN]}")
    with importlib.resources.as_file(_shipped(BUILT_IN[str(name)])) as path:
        mistral = _load_mistral(path)
    if chat_template == NONE:
        mistral.chat_format = ChatFormat("none (data.chat_template=none)", False, False)
    elif chat_template not in (AUTO, MISTRAL):
        raise BatchmixError(
            "data.chat_template: the built-in tokenizer has Mistral's turns alone; give auto, mistral or none"
        )
    return mistral


def _open_mistral(folder: Path) -> MistralTokenizer | None:
    """Mistral's tokenizer, where its vocabulary is all that the folder has, and texts begin and end as Mistral's do."""
    if files := _sentencepiece_files(folder):
        mistral = _load_mistral(files[0])
        own = _largest_added_id(folder) >= mistral.vocab_size or _has_other_ends(folder)
        return None if own else mistral
    # A folder with tokenizer.json alone: the SentencePiece model that it was made from comes with mistral-common.
    vocabulary = _vocabulary_of(folder)
    for file in _SHIPPED_FILES if len(vocabulary) in _MISTRAL_SIZES else ():
        with importlib.resources.as_file(_shipped(file)) as path:
            mistral = _load_mistral(path)
        own = _largest_added_id(folder) >= mistral.vocab_size or _has_other_ends(folder)
        if not own and mistral.has_pieces(vocabulary):
            return mistral
    return None


def _sentencepiece_files(folder: Path) -> list[Path]:
    return [folder / file for file in _SENTENCEPIECE_FILES if (folder / file).is_file()]


def _shipped(file: str) -> Traversable:
    return importlib.resources.files("mistral_common") / "data" / file


def _vocabulary_of(folder: Path) -> dict[str, int]:
    """Piece -> id as tokenizer.json has it; empty where it is another kind of tokenizer than Mistral's."""
    model = read_model_json(folder / "tokenizer.json").get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) and model.get("byte_fallback") else None
    return vocabulary if isinstance(vocabulary, dict) else {}


def _is_mistral_layout(folder: Path) -> bool:
    """Whether a folder is as mistral_inference has it: nothing in it speaks of chat templates, which others' does."""
    return (folder / "params.json").is_file() and not (folder / "tokenizer_config.json").is_file()


def _load_base(folder: Path, mistral: MistralTokenizer | None, chat_format: ChatFormat) -> Tokenizer:
    """The tokenizer for texts as they are: transformers' where the folder has its file, else SentencePiece."""
    if (folder / "tokenizer.json").is_file() or mistral is None:
        return _load_transformers(folder, chat_format, None)
    mistral.chat_format = chat_format
    return mistral


def _load_mistral(path: Path) -> MistralTokenizer:
    # Imported here because SentencePiece is not needed where prompts are token ids, as on a bare GPU machine.
    from batchmix.prompts.mistral_tokenizer import MistralTokenizer

    try:
        return MistralTokenizer(path, _num_threads())
    except (OSError, RuntimeError) as error:
        raise BatchmixError(f"{path}: not a SentencePiece model: {error}") from None


def _load_transformers(folder: Path, chat_format: ChatFormat, template: str | None) -> Tokenizer:
    # Imported here because transformers takes seconds to import and Mistral's own folders do not need it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from batchmix.prompts.jinja_tokenizer import JinjaTokenizer

    _check_ids(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise BatchmixError(f"{folder}: transformers cannot load this tokenizer: {reason}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BatchmixError(f"{folder}: no fast tokenizer; save it once with transformers to get a tokenizer.json")
    tokenizer.chat_template = template
    return JinjaTokenizer(tokenizer, chat_format)


def _num_threads() -> int:
    return min(os.cpu_count() or 1, _MAX_THREADS)


def _check_ids(folder: Path) -> None:
    """BatchmixError for an absurd token id: the tokenizers library walks through all ids below it."""
    model = read_model_json(folder / "tokenizer.json").get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = vocab.values() if isinstance(vocab, dict) else ()
    largest = max((token for token in ids if isinstance(token, int)), default=-1)
    largest = max(largest, _largest_added_id(folder))
    if largest >= MAX_VOCABULARY:
        raise BatchmixError(
            f"{folder}: its tokenizer has a token of id {largest}; ids must be below {MAX_VOCABULARY:,}"
        )


def _largest_added_id(folder: Path) -> int:
    path, added = folder / "tokenizer.json", [-1]
    try:
        added += [entry["id"] for entry in read_model_json(path).get("added_tokens", [])]
        path = folder / "tokenizer_config.json"
        added += map(int, read_model_json(path).get("added_tokens_decoder") or {})
        path = folder / "added_tokens.json"
        added += read_model_json(path).values()
        return max(added)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise BatchmixError(f"{path}: its added tokens are malformed ({error!r})") from None


def _has_other_ends(folder: Path) -> bool:
    """Whether the folder begins or ends a text otherwise than Mistral's tokenizer does, <s> before it and nothing after."""
    config = read_model_json(folder / "tokenizer_config.json")
    tokens = any(_token_content(config.get(name), default) != default for name, default in _DEFAULT_TOKENS.items())
    in_file = (folder / "tokenizer.json").is_file()  # it says so itself, and transformers goes by it
    return tokens or (not in_file and (config.get("add_bos_token") is False or config.get("add_eos_token") is True))


def _token_content(token: Any, default: str) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else default
