"""Text to token ids and back, for whatever tokenizer the model folder has."""

from __future__ import annotations

import hashlib
import importlib.resources
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchmix.data.messages import Message, PromptError
from batchmix.data.vocabulary import MAX_VOCABULARY, TokenIds
from batchmix.errors import BatchmixError
from batchmix.json_file import read_object, shown

if TYPE_CHECKING:
    from batchmix.data.mistral_tokenizer import MistralTokenizer

BUILT_IN = {"mistral-v1": "tokenizer.model.v1"}  # config.json's batchmix_tokenizer -> file of mistral-common
_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "additional_chat_templates/*.jinja")
_SENTENCEPIECE_FILES = ("tokenizer.model.v3", "tokenizer.model", "tokenizer.model.v1")
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
    def has_chat_format(self) -> bool:
        """False: a base model, whose prompts are plain texts."""

    @property
    def drops_leading_space(self) -> bool:
        """Whether one space at the start of a text's bytes is not part of the text (SentencePiece)."""

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> list[TokenIds | PromptError]:
        """The prompt of each conversation, ready for the answer, or why it has none."""

    def encode_texts(self, texts: Sequence[str]) -> list[TokenIds | PromptError]:
        """Each text as it is, after a beginning-of-sequence token where the model has one."""

    def decode(self, batch: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The text of each list of token ids; bytes that are not UTF-8 become U+FFFD."""

    def token_bytes(self, skip_special_tokens: bool = True) -> list[bytes]:
        """The bytes that each token contributes to the text, [vocab_size]; b"" for control tokens if skipped."""


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder; None where it has none, and then only token ids can be prompts.

    Mistral's SentencePiece file is used with Mistral's instruct format, unless the folder's own chat template is
    another one or its vocabulary has more tokens than that file: then it is transformers' tokenizer and template.
    """
    name = _read_json(folder / "config.json").get("batchmix_tokenizer")
    if name is not None:
        if name not in BUILT_IN:
            raise BatchmixError(f"{folder / 'config.json'}: batchmix_tokenizer={name!r}: must be one of {[*BUILT_IN]}")
        file = importlib.resources.files("mistral_common") / "data" / BUILT_IN[name]
        with importlib.resources.as_file(file) as path:
            return _load_mistral(path)
    files = [folder / file for file in _SENTENCEPIECE_FILES if (folder / file).is_file()]
    if files:
        mistral = _load_mistral(files[0])
        own = _largest_added_id(folder) >= mistral.vocab_size or _has_other_ends(folder)
        if not own and _is_mistral_template(folder):
            return mistral
    elif not (folder / "tokenizer.json").is_file():
        return None
    return _load_transformers(folder)


def tokenizer_fingerprint(folder: Path) -> str:
    """Sha256 over the files that the tokenizer and the chat format of a model folder come from."""
    digest = hashlib.sha256(str(_read_json(folder / "config.json").get("batchmix_tokenizer")).encode())
    for path in sorted(path for pattern in _FILES for path in folder.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _load_mistral(path: Path) -> MistralTokenizer:
    # Imported here because SentencePiece is not needed where prompts are token ids, as on a bare GPU machine.
    from batchmix.data.mistral_tokenizer import MistralTokenizer

    try:
        return MistralTokenizer(path, _num_threads())
    except (OSError, RuntimeError) as error:
        raise BatchmixError(f"{path}: not a SentencePiece model: {error}") from None


def _load_transformers(folder: Path) -> Tokenizer:
    # Imported here because transformers takes seconds to import and Mistral's own folders do not need it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from batchmix.data.jinja_tokenizer import JinjaTokenizer

    template = _read_chat_template(folder, _read_json(folder / "tokenizer_config.json"))
    _check_ids(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise BatchmixError(f"{folder}: transformers cannot load this tokenizer: {reason}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BatchmixError(f"{folder}: no fast tokenizer; save it once with transformers to get a tokenizer.json")
    tokenizer.chat_template = template
    return JinjaTokenizer(tokenizer)


def _num_threads() -> int:
    return min(os.cpu_count() or 1, _MAX_THREADS)


def _check_ids(folder: Path) -> None:
    """BatchmixError for an absurd token id: the tokenizers library walks through all ids below it."""
    model = _read_json(folder / "tokenizer.json").get("model") if (folder / "tokenizer.json").is_file() else None
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
        added += [entry["id"] for entry in _read_json(path).get("added_tokens", [])]
        path = folder / "tokenizer_config.json"
        added += map(int, _read_json(path).get("added_tokens_decoder") or {})
        path = folder / "added_tokens.json"
        added += _read_json(path).values()
        return max(added)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise BatchmixError(f"{path}: its added tokens are malformed ({error!r})") from None


def _has_other_ends(folder: Path) -> bool:
    """Whether the folder begins or ends a text otherwise than Mistral's tokenizer does, <s> before it and nothing after."""
    config = _read_json(folder / "tokenizer_config.json")
    tokens = any(_token_content(config.get(name), default) != default for name, default in _DEFAULT_TOKENS.items())
    in_file = (folder / "tokenizer.json").is_file()  # it says so itself, and transformers goes by it
    return tokens or (not in_file and (config.get("add_bos_token") is False or config.get("add_eos_token") is True))


def _is_mistral_template(folder: Path) -> bool:
    """Whether the folder has no chat template, or one that writes Mistral's turns, whatever its spaces.

    It is tried on conversations rather than compared: Mistral's template has been published in many wordings.
    """
    config = _read_json(folder / "tokenizer_config.json")
    template = _read_chat_template(folder, config)
    if template is None:
        return True
    variables = {name: _token_content(config.get(name), default) for name, default in _DEFAULT_TOKENS.items()}
    user, answer, system = ({"role": role, "content": role} for role in ("user", "assistant", "system"))
    turns = "[INST]user[/INST]assistant</s>[INST]user[/INST]"
    with_system = {turns.replace("user", "systemuser", 1), "systemuser".join(turns.rsplit("user", 1))}
    if _render_bare(template, [user, answer, user], variables) != turns:
        return False
    rendered = _render_bare(template, [system, user, answer, user], variables)
    return rendered is None or rendered in with_system  # older ones refuse a system message


_DEFAULT_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def _render_bare(template: str, messages: list[dict[str, str]], variables: Mapping[str, str]) -> str | None:
    """What the template writes, without white space and the leading <s>; None where it fails."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    try:
        text = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **variables)
    except Exception:
        return None
    return "".join(text.split()).removeprefix("<s>")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def named_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The folder's chat templates by name, from where transformers takes them: files before tokenizer_config.json."""
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    found: Any = config.get("chat_template")
    if files:
        try:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        except (OSError, ValueError) as error:
            raise BatchmixError(f"{folder}: a chat template cannot be read ({error})") from None
    if found is None or isinstance(found, str):
        return {} if found is None else {"default": found}
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found}
    if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        path = folder / "tokenizer_config.json"
        raise BatchmixError(f"{path}: chat_template must be a text or a list of {{name, template}}, not {shown(found)}")
    return found


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template that is used where none is named; None where the folder has none at all."""
    templates = named_templates(folder, config)
    if templates and "default" not in templates:
        raise BatchmixError(
            f"{folder}: of its chat templates ({', '.join(map(repr, templates))}) none is called 'default';"
            " name one with data.chat_template"
        )
    return templates.get("default")


def _token_content(token: Any, default: str) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else default


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    return read_object(path) if path.exists() else {}
