"""What a folder's tokenizer_config.json says is heeded, has no effect as docs/checkpoints.md has it, or is refused."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from batchmix.errors import BatchmixError
from batchmix.prompts.jinja_tokenizer import JinjaTokenizer
from batchmix.prompts.mistral_tokenizer import MistralTokenizer
from batchmix.prompts.tokenizer import load_tokenizer, tokenizer_fingerprint
from batchmix.templates.messages import PromptError, parse_messages

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
V1 = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
NAMED = (
    "{% for m in messages %}{{ '<|im_start|>' + (m['name'] if m['name'] is defined and m['role'] == 'user' else m['role'])"
    " + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
CHATML = NAMED.replace("(m['name'] if m['name'] is defined and m['role'] == 'user' else m['role'])", "m['role']")


def documented(use: str) -> set[str]:
    [row] = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| `tokenizer_config.json` | {use} |")]
    return set(re.findall(r"`(\w+)`", row.split("|")[3]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    backend = Tokenizer(
        models.BPE({piece: k for k, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<|im_start|>", special=False)])
    (tmp_path / "model").mkdir()
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    return configure(
        tmp_path / "model", tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="<|im_end|>"
    )


def configure(folder: Path, **values: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))
    return folder


def encode(tokenizer: Any, *messages: dict[str, str]) -> list[int] | str:
    [found] = tokenizer.encode_chats([parse_messages(list(messages), "messages")])
    return str(found) if isinstance(found, PromptError) else list(found)


def refusal(folder: Path) -> str:
    with pytest.raises(BatchmixError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_key_of_transformers_tokenizers_is_missing() -> None:
    found = set(inspect.signature(LlamaTokenizer.__init__).parameters) - {"self", "kwargs"}
    found |= set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)
    for code in (
        PreTrainedTokenizerBase.__init__,
        TokenizersBackend.__init__,
        PreTrainedTokenizerBase._from_pretrained,
    ):
        found |= set(re.findall(r'kwargs\.(?:pop|get|setdefault)\(\s*"(\w+)"', inspect.getsource(code)))
    internal = {name for name in found if name.startswith("_")} | {"tokenizer", "tokenizer_object", "gguf_file", "post_processor",
        "tokenizer_padding", "tokenizer_truncation"}  # fmt: skip
    assert found - internal - documented("used") - documented("no effect") == set()


WITHOUT_EFFECT = {"padding_side": "right", "truncation_side": "left", "model_input_names": ["input_ids"], "init_inputs": [],
                  "auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}, "sp_model_kwargs": {}, "model_max_length": 3,
                  "backend": "tokenizers", "files_loaded": [], "chat_control_tokens": [], "name_or_path": "x/y",
                  "special_tokens_map_file": "/etc/passwd", "response_template": "x"}  # fmt: skip


@pytest.mark.parametrize("key", sorted(documented("no effect")))
def test_a_key_without_effect_changes_no_id_and_no_text(folder: Path, key: str) -> None:
    messages = {"role": "user", "content": "Hi , there <|im_end|> ."}, {"role": "assistant", "content": "x"}
    texts = []
    for values in ({"chat_template": CHATML}, {key: WITHOUT_EFFECT.get(key, True)}):
        tokenizer = load_tokenizer(configure(folder, **values))
        assert tokenizer is not None
        ids = encode(tokenizer, *messages, messages[0])
        assert isinstance(ids, list)
        texts.append(
            (ids, tokenizer.decode([ids], False), tokenizer.decode([ids]), list(tokenizer.encode_texts(["a . b"])[0]))
        )
    assert texts[0] == texts[1]


def test_the_end_token_is_the_one_that_the_file_names(folder: Path) -> None:
    for token in ("</s>", "<|im_end|>", {"__type": "AddedToken", "content": "</s>"}):
        tokenizer = load_tokenizer(configure(folder, eos_token=token))
        assert tokenizer is not None
        assert (
            tokenizer.eos_id == {"</s>": 257, "<|im_end|>": 258}[token if isinstance(token, str) else token["content"]]
        )


# ---- Names of who speaks


def test_a_name_reaches_a_template_that_writes_it(folder: Path) -> None:
    tokenizer = load_tokenizer(configure(folder, chat_template=NAMED))
    named = {"role": "user", "name": "ada", "content": "Hi"}
    theirs = AutoTokenizer.from_pretrained(folder)
    assert encode(tokenizer, named) == theirs.apply_chat_template([named], return_dict=False)
    assert encode(tokenizer, named) != encode(tokenizer, {"role": "user", "content": "Hi"})
    assert encode(tokenizer, {**named, "name": None}) == encode(tokenizer, {"role": "user", "content": "Hi"})  # type: ignore[dict-item]


def test_a_name_that_would_be_lost_is_an_error(folder: Path) -> None:
    tokenizer = load_tokenizer(configure(folder, chat_template=NAMED))
    system = {"role": "system", "name": "bob", "content": "Hi"}
    lost = "the model's chat template does not write its name; take it out"
    assert (
        encode(tokenizer, system, {"role": "user", "name": "ada", "content": "Hi"}) == f"messages[0] (system): {lost}"
    )
    assert encode(MistralTokenizer(V1, 1), {"role": "user", "name": "ada", "content": "Hi"}) == (
        "messages[0] (user): Mistral's chat format has no place for a name; take it out"
    )
    assert isinstance(encode(MistralTokenizer(V1, 1), {"role": "user", "name": "", "content": "Hi"}), list)
    for name in (5, ["ada"]):
        with pytest.raises(PromptError, match=r"messages\[0\] \(user\): name must be text"):
            parse_messages([{"role": "user", "name": name, "content": "Hi"}], "messages")


def test_a_name_cannot_forge_control_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(configure(folder, chat_template=NAMED))
    ids = encode(tokenizer, {"role": "user", "name": "ada<|im_end|>", "content": "Hi"})
    assert isinstance(ids, list)
    assert ids.count(258) == 1


# ---- Named templates


@pytest.mark.parametrize("in_files", [True, False])
def test_named_templates_without_a_default_are_refused_with_their_names(folder: Path, in_files: bool) -> None:
    if in_files:
        (folder / "additional_chat_templates").mkdir()
        for name in ("chat", "tool_use"):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(CHATML)
    else:
        configure(folder, chat_template=[{"name": name, "template": CHATML} for name in ("chat", "tool_use")])
    message = refusal(folder)
    assert "of its chat templates ('chat', 'tool_use') none is called 'default'" in message
    assert "data.chat_template" in message


@pytest.mark.parametrize("with_model", [True, False])
def test_the_default_of_several_templates_is_the_one_of_transformers(folder: Path, with_model: bool) -> None:
    if with_model:
        shutil.copy(V1, folder / "tokenizer.model")
    configure(folder, chat_template=[{"name": "other", "template": NAMED}, {"name": "default", "template": CHATML}])
    message = {"role": "user", "content": "Hi"}
    for _ in range(2):
        tokenizer = load_tokenizer(folder)
        assert isinstance(tokenizer, JinjaTokenizer)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert encode(tokenizer, message) == theirs.apply_chat_template([message], return_dict=False)
        before = tokenizer_fingerprint(folder)
        (folder / "chat_template.jinja").write_text("file:" + CHATML)  # comes before tokenizer_config.json
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / "other.jinja").write_text(NAMED)
    assert tokenizer_fingerprint(folder) == before != ""


def test_an_empty_list_of_templates_is_no_template(folder: Path) -> None:
    tokenizer = load_tokenizer(configure(folder, chat_template=[]))
    assert tokenizer is not None
    assert not tokenizer.chat_format.chats


@pytest.mark.parametrize("template", [5, True, ["x"], [{"name": "default"}], [{"template": "x"}], {"default": 5}])
def test_a_template_of_another_type_is_one_line(folder: Path, template: object) -> None:
    assert "tokenizer_config.json: chat_template must be a text" in refusal(configure(folder, chat_template=template))


# ---- Folders with tokenizer.model


def sentencepiece_folder(folder: Path, **config: Any) -> Path:
    """A small vocabulary of Mistral's kind: transformers takes seconds to find the merges of 32,000 pieces."""
    folder.mkdir()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["Hello there, you", "the quick brown fox jumps over the lazy dog"] * 20),
        model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=400, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return configure(folder, tokenizer_class="LlamaTokenizer", **ends, **config)


@pytest.mark.parametrize("added", [True, False])
def test_a_folder_with_nothing_but_tokenizer_model(tmp_path: Path, added: bool) -> None:
    """transformers needs protobuf for it."""
    folder = sentencepiece_folder(tmp_path / "model", chat_template=CHATML)
    size = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    if added:
        token = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        configure(folder, eos_token="<|im_end|>", added_tokens_decoder={str(size): {**token, "special": True}})
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, JinjaTokenizer)
    theirs = AutoTokenizer.from_pretrained(folder)
    message = {"role": "user", "content": "Hello  there,\nyou"}
    assert encode(tokenizer, message) == theirs.apply_chat_template([message], return_dict=False)
    assert tokenizer.eos_id == (size if added else 2)


@pytest.mark.parametrize(
    ("values", "around"),
    [({"add_bos_token": False}, ([], [])), ({"add_bos_token": True, "add_eos_token": True}, ([1], [2]))],
)
def test_other_tokens_at_the_ends_of_a_text_are_heeded(tmp_path: Path, values, around) -> None:
    folder = sentencepiece_folder(tmp_path / "model", **values)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    [ids] = tokenizer.encode_texts(["Hello"])
    assert list(ids) == AutoTokenizer.from_pretrained(folder)("Hello").input_ids
    assert (list(ids)[: len(around[0])], list(ids)[len(ids) - len(around[1]) :]) == around


# ---- Malformed files


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("tokenizer_config.json", "[" * 100_000, "nested too deeply"),
        ("tokenizer_config.json", "{}{}", "cannot be read as JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "its added tokens are malformed"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}', "its added tokens are malformed"),
        ("added_tokens.json", '{"x": "y"}', "its added tokens are malformed"),
        ("tokenizer.json", '{"added_tokens": [{}]}', "its added tokens are malformed"),
        ("tokenizer.json", '{"added_tokens": 5}', "its added tokens are malformed"),
    ],
)  # fmt: skip
def test_malformed_files_are_one_line(folder: Path, file: str, content: str, text: str) -> None:
    shutil.copy(V1, folder / "tokenizer.model")
    (folder / file).write_text(content)
    message = refusal(folder)
    assert file in message
    assert text in message


def test_an_absurd_token_id_allocates_nothing(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["zz"] = 10**9
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert "has a token of id 1000000000" in refusal(folder)
