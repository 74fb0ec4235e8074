"""Which template makes a row's prompt: the folder's own, Mistral's, none, or what data.chat_template says."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_cases import slow_after
from tokenizer_folders import (
    CHATML,
    MISTRAL_PLAIN,
    MISTRAL_SYSTEM_LAST,
    V1,
    V3,
    convert,
    convert_v1,
    save,
    train_byte_level,
    write_json,
)

from batchmix.checkpoints.checkpoint import TINY
from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.observability.clock import StageClock
from batchmix.output.config import OutputConfig
from batchmix.prompts.jinja_tokenizer import JinjaTokenizer
from batchmix.prompts.mistral_tokenizer import MistralTokenizer
from batchmix.prompts.prompt import PromptBuilder, without_pauses
from batchmix.prompts.tokenizer import Tokenizer, load_tokenizer
from batchmix.records import InputRow, Prompt
from batchmix.sampling import SamplingConfig
from batchmix.templates.chat_template import read_chat_template, writes_mistral
from batchmix.templates.messages import PromptError, parse_messages


def turns(user: str, answer: str = "{{ m['content'] + eos_token }}", bos: str = "{{ bos_token }}") -> str:
    """A template that writes each user turn as `user` says."""
    refuse = "{{ raise_exception('no such role') }}"
    return (
        f"{bos}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{user}"
        f"{{% elif m['role'] == 'assistant' %}}{answer}{{% else %}}{refuse}{{% endif %}}{{% endfor %}}"
    )


MARKED = "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
OFFICIAL = (  # as on the hub, 8x7B's with `first` and 8x22B's with `last` and `| trim`
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content'] %}\n"
    "    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n{%- endif %}\n\n"
    "{{- bos_token }}\n{%- for message in loop_messages %}\n"
    "    {%- if message['role'] == 'user' %}\n        {%- if loop.WHICH and system_message is defined %}\n"
    "            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}\n        {%- else %}\n"
    "            {{- ' [INST] ' + message['content'] + ' [/INST]' }}\n        {%- endif %}\n"
    "    {%- else %}\n        {{- ' ' + message['content']TRIM + eos_token}}\n    {%- endif %}\n{%- endfor %}\n"
)
OFFICIAL_V1 = OFFICIAL.replace("WHICH", "first").replace("TRIM", "")
OFFICIAL_V3 = OFFICIAL.replace("WHICH", "last").replace("TRIM", "|trim")
SAME = {
    "plain": turns(MARKED),
    "published first": MISTRAL_PLAIN,
    "no spaces": turns("{{ '[INST]' + m['content'] + '[/INST]' }}"),
    "a space at the end": turns("{{ '[INST] ' + m['content'] + ' [/INST] ' }}"),
    "a space after the answer": turns(MARKED, "{{ m['content'] + ' ' + eos_token + ' ' }}"),
}
FOREIGN = {
    "a line break after the mark": turns("{{ '[INST]\n' + m['content'] + ' [/INST]' }}"),
    "a line break after the turn": turns("{{ '[INST] ' + m['content'] + ' [/INST]\n' }}"),
    "two spaces": turns("{{ '[INST]  ' + m['content'] + ' [/INST]' }}"),
    "two spaces between turns": turns(MARKED, "{{ m['content'] + eos_token + '  ' }}"),
    "a tab": turns("{{ '[INST]\t' + m['content'] + ' [/INST]' }}"),
    "no beginning": turns(MARKED, bos=""),
    "two beginnings": turns(MARKED, bos="{{ bos_token + bos_token }}"),
    "no end of an answer": turns(MARKED, "{{ m['content'] }}"),
    "trims the user's text": turns("{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"),
    "trims the answer": turns(MARKED, "{{ m['content'] | trim + eos_token }}"),
    "a system prompt of its own": turns("{{ '[INST] Be good. ' + m['content'] + ' [/INST]' }}"),
    "drops the system's text": turns(MARKED).replace("{{ raise_exception('no such role') }}", ""),
    "one line break after the system's text": OFFICIAL_V1.replace("\\n\\n", "\\n"),
    "adds a prompt for the answer": turns(MARKED) + "{% if add_generation_prompt %}{{ ' Answer:' }}{% endif %}",
    "chatml": CHATML,
}


@pytest.fixture(scope="module")
def backends() -> dict[int, Any]:
    return {1: convert(V1), 3: convert(V3)}


def folder_of(folder: Path, backend: Any, template: Any, sentencepiece: Path | None = V1, **keys: Any) -> Path:
    save(folder, backend, template, **({"eos_token": "</s>"} | keys))
    write_json(folder / "config.json", {"model_type": "mixtral"})
    if sentencepiece is not None:
        shutil.copy(sentencepiece, folder / "tokenizer.model")
    return folder


def loaded(folder: Path, chat_template: str = "auto") -> Tokenizer:
    tokenizer = load_tokenizer(folder, chat_template)
    assert tokenizer is not None
    return tokenizer


def encode(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    [ids] = tokenizer.encode_chats([parse_messages(messages, "messages")])
    assert not isinstance(ids, PromptError), ids
    return list(ids)


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("version", "template", "is_mistral"),
    [
        *(pytest.param(version, template, True, id=name) for name, template in SAME.items() for version in (1, 3)),
        *(pytest.param(1, template, False, id=name) for name, template in FOREIGN.items()),
        (1, OFFICIAL_V1, True),
        (1, OFFICIAL_V3, False),
        (1, MISTRAL_SYSTEM_LAST, False),
        (3, OFFICIAL_V3, True),
        (3, MISTRAL_SYSTEM_LAST, True),
        (3, OFFICIAL_V1, False),
        (3, FOREIGN["a line break after the mark"], False),
    ],
)
def test_whether_a_template_writes_mistrals_turns(
    tmp_path: Path, version: int, template: str, is_mistral: bool
) -> None:
    """The system's text begins v1's first user turn and v3's last."""
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    assert writes_mistral(template, tmp_path, version) is is_mistral


def test_a_template_that_has_other_special_tokens_is_not_mistrals(tmp_path: Path) -> None:
    config, tokens = tmp_path / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"}
    for other in ({}, {"bos_token": None, "eos_token": "</s>"}, tokens | {"eos_token": "<unk>"}):
        write_json(config, other)
        assert not writes_mistral(SAME["plain"], tmp_path, 1)
    write_json(tmp_path / "special_tokens_map.json", tokens | {"eos_token": {"content": "</s>"}})
    assert writes_mistral(SAME["plain"], tmp_path, 1)
    write_json(config, {"added_tokens_decoder": {}})  # where transformers does not read the other file
    assert not writes_mistral(SAME["plain"], tmp_path, 1)


@pytest.mark.parametrize("sentencepiece", [True, False], ids=["tokenizer.model", "tokenizer.json alone"])
@pytest.mark.parametrize(("version", "template"), [(1, OFFICIAL_V1), (3, OFFICIAL_V3)])
def test_a_template_that_writes_mistrals_turns_has_them_from_mistrals_tokenizer(
    tmp_path: Path, backends: dict[int, Any], sentencepiece: bool, version: int, template: str
) -> None:
    path = {1: V1, 3: V3}[version] if sentencepiece else None
    tokenizer = loaded(folder_of(tmp_path / "m", backends[version], template, path))
    assert isinstance(tokenizer, MistralTokenizer)
    assert tokenizer.chat_format.name == f"Mistral's v{version}, which the model folder's own writes too"


@pytest.mark.parametrize("where", slow_after(1, ["file", "config", "named"]))
def test_a_template_that_writes_anything_else_is_used_as_it_is(
    tmp_path: Path, backends: dict[int, Any], where: str
) -> None:
    template = FOREIGN["a line break after the mark"]
    in_config: Any = {"config": template, "file": SAME["plain"], "named": [{"name": "default", "template": template}]}
    folder = folder_of(tmp_path / "m", backends[1], in_config[where])
    if where == "file":  # which wins
        (folder / "chat_template.jinja").write_text(template)
    tokenizer = loaded(folder)
    assert isinstance(tokenizer, JinjaTokenizer)
    assert tokenizer.chat_format.name == "the model folder's own"
    messages = [{"role": "user", "content": "Where is my parcel?"}]
    assert tokenizer.decode([encode(tokenizer, messages)], False) == ["<s> [INST]\nWhere is my parcel? [/INST]"]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20) | st.sampled_from(
    [" x ", "\n", "a\n\n b ", "[INST] y [/INST]", "  two", "\t", "né\u3000e", "x" * 40]
)
conversations = st.tuples(st.lists(st.tuples(texts, texts), max_size=2), texts)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """All with a small vocabulary, two with Mistral's, which takes long to load."""
    root, small, large = tmp_path_factory.mktemp("foreign"), train_byte_level(), convert_v1()
    folders = {name: folder_of(root / name.replace(" ", ""), small, FOREIGN[name], None) for name in FOREIGN}
    large_ones = {f"large, {name}": name for name in ("a line break after the mark", "chatml")}
    folders |= {key: folder_of(root / key.replace(" ", ""), large, FOREIGN[name]) for key, name in large_ones.items()}
    return {name: (loaded(folder), reference(folder)) for name, folder in folders.items()}


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from([*FOREIGN, "large, a line break after the mark", "large, chatml"]), conversation=conversations
)
def test_ids_of_other_templates_equal_transformers(
    foreign: dict[str, tuple[Tokenizer, Any]], name: str, conversation: tuple[list[tuple[str, str]], str]
) -> None:
    tokenizer, theirs = foreign[name]
    messages = []
    for user, answer in conversation[0]:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": conversation[1]})
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode(tokenizer, messages) == expected


# ---- Base models


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, backends: dict[int, Any]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "both files": folder_of(root / "both", backends[1], None),
        "byte level": save(root / "bytes", train_byte_level(), None),
        "empty template": save(root / "empty", train_byte_level(), ""),
        "empty list": save(root / "list", train_byte_level(), []),
    }


@pytest.fixture(scope="module")
def base_tokenizers(bases: dict[str, Path]) -> dict[str, tuple[Tokenizer, Any]]:
    return {name: (loaded(folder), reference(folder)) for name, folder in bases.items()}


BASES = ["both files", "byte level", "empty template", "empty list"]


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(BASES), text=texts)
def test_ids_of_a_base_model_equal_its_tokenizers(
    base_tokenizers: dict[str, tuple[Tokenizer, Any]], name: str, text: str
) -> None:
    tokenizer, theirs = base_tokenizers[name]
    assert (tokenizer.chat_format.chats, tokenizer.chat_format.prompts) == (False, False)
    [ids] = tokenizer.encode_texts([text])
    assert not isinstance(ids, PromptError)
    assert list(ids) == theirs(text).input_ids


def test_a_base_model_with_sentencepiece_alone(tmp_path: Path) -> None:
    shutil.copy(V1, tmp_path / "tokenizer.model")
    tokenizer = loaded(tmp_path)
    assert tokenizer.chat_format.chats is False
    [ids] = tokenizer.encode_texts(["Once upon a time"])
    assert list(ids) == [1, 5713, 3714, 264, 727]


# ---- data.chat_template


def test_what_data_chat_template_says_is_used(tmp_path: Path, backends: dict[int, Any]) -> None:
    folder = save(tmp_path / "m", train_byte_level(), CHATML)
    messages = [{"role": "user", "content": "hi"}]
    none, mistral = loaded(folder, "none"), loaded(folder_of(tmp_path / "v1", backends[1], CHATML), "mistral")
    assert (none.chat_format.chats, none.chat_format.prompts) == (False, False)
    assert isinstance(mistral, MistralTokenizer)
    assert mistral.decode([encode(mistral, messages)]) == ["[INST] hi [/INST]"]
    jinja = loaded(folder, FOREIGN["two spaces"])
    theirs = reference(folder)
    expected = theirs.apply_chat_template(messages, chat_template=FOREIGN["two spaces"], return_dict=False)
    assert encode(jinja, messages) == expected
    with pytest.raises(BatchmixError, match=r"^data\.chat_template is broken, line 1"):
        loaded(folder, "{% oops")
    refusing = loaded(
        folder, "{% if messages[0].content != 'a' %}{{ raise_exception('not so') }}{% endif %}{{ bos_token }}"
    )
    [error] = refusing.encode_chats([parse_messages(messages, "messages")])
    assert str(error) == "data.chat_template refuses this row: not so"
    with pytest.raises(
        BatchmixError, match=r"data\.chat_template=chat: must be auto, .* its templates are called default"
    ):
        loaded(folder, "chat")
    with pytest.raises(BatchmixError, match=r"data\.chat_template=mistral: the vocabulary in .* is not Mistral's"):
        loaded(folder, "mistral")


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "chat", "template": CHATML}, {"name": "tool_use", "template": SAME["plain"]}]
    folder = save(tmp_path / "list", train_byte_level(), named)
    files = save(tmp_path / "files", train_byte_level(), SAME["plain"])
    (files / "additional_chat_templates").mkdir()
    (files / "additional_chat_templates" / "chat.jinja").write_text(CHATML)
    for path in (folder, files):
        assert loaded(path, "chat").chat_format.name == "the model folder's 'chat'"
        with pytest.raises(
            BatchmixError, match=r"of its chat templates \('chat'(, 'tool_use')?\) none is called 'default'"
        ):
            loaded(path)
    write_json(folder / "tokenizer_config.json", {"chat_template": [{"template": "x"}]})
    with pytest.raises(BatchmixError, match="chat_template must be a text, or a list of names and templates"):
        loaded(folder)


def test_a_folder_in_mistrals_layout_does_not_say_whether_it_is_a_base_model(tmp_path: Path) -> None:
    shutil.copy(V3, tmp_path / "tokenizer.model.v3")
    write_json(tmp_path / "params.json", {})
    tokenizer = loaded(tmp_path)
    assert (tokenizer.chat_format.chats, tokenizer.chat_format.prompts) == (True, None)
    for setting, prompts in (("mistral", True), ("none", False)):
        assert loaded(tmp_path, setting).chat_format.prompts is prompts
    write_json(
        tmp_path / "tokenizer_config.json", {"chat_template": SAME["plain"], "bos_token": "<s>", "eos_token": "</s>"}
    )
    assert loaded(tmp_path).chat_format.prompts is True


def test_the_built_in_model_is_mistrals() -> None:
    assert loaded(TINY).chat_format.prompts is True
    assert loaded(TINY, "none").chat_format.prompts is False
    with pytest.raises(BatchmixError, match=r"data\.chat_template: the built-in tokenizer has Mistral's turns alone"):
        loaded(TINY, CHATML)


def test_a_file_is_read_once_and_other_values_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(value: str) -> str:
        return read_chat_template(Config(data=DataConfig(path="x", chat_template=value))).data.chat_template

    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jinja").write_text(CHATML)
    (tmp_path / "text.jinja").write_text("no template")
    (tmp_path / "latin.jinja").write_bytes(b"{{ '\xff' }}")
    (tmp_path / "auto").write_text(CHATML)
    assert read("chat.jinja") == read(str(tmp_path / "chat.jinja")) == read(CHATML) == CHATML
    assert [read(word) for word in ("auto", "none", "mistral", "tool_use")] == ["auto", "none", "mistral", "tool_use"]
    for value, reason in {
        "": "give auto, none, mistral, a Jinja file or Jinja text",
        "missing.jinja": "there is no such file",
        "no/such": "there is no such file",
        "text.jinja": "the file has no Jinja in it",
        "latin.jinja": "cannot be read",
        "x" * 5000: "cannot be read",
    }.items():
        with pytest.raises(BatchmixError, match=reason) as caught:
            read(value)
        assert str(caught.value).startswith("data.chat_template=")


# ---- Rows


def prompts(rows: list[InputRow], folder: Path, chat_template: str = "auto", **options: Any) -> list[Prompt]:
    data = DataConfig("x", chat_template=chat_template, **options)
    tokenizer = load_tokenizer(folder, chat_template)
    builder = PromptBuilder(data, SamplingConfig(), tokenizer, max_model_len=4096, vocab_size=32000)
    return list(without_pauses(builder.build(builder.show_first(rows), keep=[], clock=StageClock())))


def row(number: int = 0, text: str | None = None, **columns: Any) -> InputRow:
    return InputRow(number, str(number), columns, text=text)


CHAT = [{"role": "user", "content": "hi"}]
HI = [1, 12014]  # <s> and ▁hi


def test_prompts_of_a_base_model_are_sent_as_they_are(bases: dict[str, Path]) -> None:
    folder = bases["byte level"]
    as_it_is = reference(folder)("hi").input_ids
    found = prompts([row(prompt="hi"), row(text="hi"), row(messages=CHAT)], folder)
    assert [list(prompt.token_ids) for prompt in found] == [as_it_is, as_it_is, []]
    assert found[2].error is not None
    assert found[2].error.startswith(
        "messages: messages need a chat template, and there is none (data.chat_template: none"
    )
    [templated] = prompts([row(a="h")], folder, template="{{ a }}i")
    assert list(templated.token_ids) == as_it_is
    with pytest.raises(
        BatchmixError, match=r"^messages: messages need a chat template, .* set data\.chat_template=mistral"
    ):
        prompts([row(broken=1), row(messages=CHAT)], folder)
    for options in ({"system_prompt": "x"}, {"system_prompt_column": "x"}):
        with pytest.raises(BatchmixError, match=f"^data.{next(iter(options))}: without a chat template"):
            prompts([row(prompt="hi")], folder, **options)


def test_completion_requests_are_never_templated(tmp_path: Path) -> None:
    for folder in (TINY, save(tmp_path / "m", train_byte_level(), CHATML)):
        raw, chat, empty = prompts([row(text="hi"), row(messages=CHAT), row(text="")], folder)
        assert loaded(folder).decode([raw.token_ids]) == ["hi"]
        assert len(chat.token_ids) > len(raw.token_ids)
        assert empty.error == "body.prompt is empty"
    [refused] = prompts([row(text="hi")], TINY, system_prompt="Be kind.")
    assert refused.error == "data.system_prompt: a request to /v1/completions has no system message"


def test_plain_prompts_on_mistrals_layout_are_refused(tmp_path: Path) -> None:
    shutil.copy(V1, tmp_path / "tokenizer.model")
    write_json(tmp_path / "params.json", {})
    [chat, raw] = prompts([row(messages=CHAT), row(text="hi")], tmp_path)
    assert chat.error is None
    assert list(raw.token_ids) == HI
    for rows, options, key in (
        ([row(prompt="hi")], {}, "prompt"),
        ([row(a="hi")], {"template": "{{ a }}"}, "data.template"),
    ):
        with pytest.raises(
            BatchmixError, match=rf"^{key}: .* set data\.chat_template=mistral .* data\.chat_template=none"
        ):
            prompts(rows, tmp_path, **options)
        [wrapped] = prompts(rows, tmp_path, "mistral", **options)
        [plain] = prompts(rows, tmp_path, "none", **options)
        assert (list(plain.token_ids), len(wrapped.token_ids) > 5) == (HI, True)


def test_system_prompts_are_templates_or_columns() -> None:
    def shown(*rows: InputRow, **options: Any) -> list[str | None]:
        tokenizer = loaded(TINY)
        return [
            prompt.error or tokenizer.decode([prompt.token_ids])[0] for prompt in prompts(list(rows), TINY, **options)
        ]

    one, two = row(0, prompt="hi", who="Ann", rules="Be brief."), row(1, prompt="hi", who="", rules=None)
    template = "{% if who %}You are {{ who }}.\n{% endif %}"
    assert shown(one, two, system_prompt=template) == ["[INST] You are Ann.\n\n\nhi [/INST]", "[INST] hi [/INST]"]
    assert shown(one, two, system_prompt="Fixed\n") == 2 * ["[INST] Fixed\n\n\nhi [/INST]"]
    assert shown(one, two, system_prompt_column="rules") == ["[INST] Be brief.\n\nhi [/INST]", "[INST] hi [/INST]"]
    both = shown(one, two, system_prompt_column="rules", system_prompt="Fixed")
    assert both == ["[INST] Be brief.\n\nhi [/INST]", "[INST] Fixed\n\nhi [/INST]"]
    own = row(messages=[{"role": "system", "content": "Mine."}, *CHAT], rules="Be brief.")
    assert shown(own, system_prompt_column="rules") == ["[INST] Mine.\n\nhi [/INST]"]
    wrong = row(prompt="hi", rules=5)
    assert shown(wrong, system_prompt_column="rules") == ["rules must be text, not int"]
    assert shown(one, system_prompt="{{ 1 / 0 }}") == ["data.system_prompt fails on this row: division by zero"]
    assert shown(one, template="{{ who }}\n\n") == ["[INST] Ann\n\n [/INST]"]


# ---- The log


def test_the_log_says_which_template_runs_and_shows_the_first_prompt(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "batchmix"):
        prompts([row(0, prompt=5), row(3, prompt="one\ntwo"), row(4, prompt="three")], TINY)
    assert caplog.messages == [
        "chat template: Mistral's v1",
        r"first prompt, row 3, 11 tokens: '<s> [INST] one\ntwo [/INST]'",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "batchmix"):
        prompts([row(prompt="word " * 1000)], TINY)
    assert len(caplog.messages[-1]) < 320
    assert " ... " in caplog.messages[-1]


def test_text_that_has_marks_already_warns_once(
    bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    marked = [row(1, prompt="<b>"), row(2, prompt="[INST] hi [/INST]"), row(3, prompt="<<SYS>>")]
    prompts(marked, TINY)
    [warning] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("row 2: its text holds [INST], the marks of a chat template")
    caplog.clear()
    prompts(marked, bases["byte level"])  # there they are text, and nothing is added
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
    prompts([row(5, text="<|im_end|>")], save(tmp_path / "m", train_byte_level(), CHATML))
    [warning] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("row 5: its text holds <|im_end|>, which is encoded as text, not as the control token")


# ---- Whole runs


@pytest.fixture
def base_model(tmp_path: Path, bases: dict[str, Path]) -> Path:
    """The built-in model's weights in a base model's folder."""
    folder = shutil.copytree(bases["byte level"], tmp_path / "model")
    shutil.copy(TINY / "model.safetensors", folder)
    config = json.loads((TINY / "config.json").read_text())
    del config["batchmix_tokenizer"]
    write_json(folder / "config.json", config)
    return folder


def job(tmp_path: Path, model: Path, lines: list[dict[str, Any]], name: str = "out", **data: Any) -> Config:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = Config(
        data=DataConfig(str(path), **data),
        sampling=SamplingConfig(max_tokens=2, temperature=0.0),
        output=OutputConfig(dir=str(tmp_path / name)),
    )
    config.model.path, config.engine.device = str(model), "cpu"
    return config


def answered(tmp_path: Path, name: str = "out") -> list[tuple[int, str | None]]:
    import pyarrow.dataset as ds

    table = ds.dataset(tmp_path / name, format="arrow").to_table().to_pylist()
    return [(line["prompt_tokens"], line["error"]) for line in sorted(table, key=lambda line: line["row"])]


def test_runs_of_a_base_model(tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchmix import pipeline
    from batchmix.distributed import executor
    from batchmix.plan import plan_report

    pipeline.generate(job(tmp_path, base_model, [{"prompt": "hi"}, {"prompt": "hi"}]))
    tokens = len(reference(base_model)("hi").input_ids)
    assert answered(tmp_path) == 2 * [(tokens, None)]
    with monkeypatch.context() as patch:
        patch.setattr(executor, "start_engine", lambda *_: pytest.fail("the model is loaded"))
        config = job(tmp_path, base_model, [{"messages": CHAT}], "chats")
        for run in (pipeline.generate, plan_report):
            with pytest.raises(BatchmixError, match=r"set data\.chat_template=mistral"):
                run(config)
    config.data.chat_template = CHATML  # into the folder that the refused run has made
    pipeline.generate(config)
    theirs = reference(base_model).apply_chat_template(
        CHAT, chat_template=CHATML, add_generation_prompt=True, return_dict=False
    )
    assert answered(tmp_path, "chats") == [(len(theirs), None)]


def test_another_template_is_another_run(tmp_path: Path, base_model: Path) -> None:
    from batchmix.pipeline import generate

    file, copy = tmp_path / "chat.jinja", tmp_path / "copy.jinja"
    file.write_text(CHATML)
    copy.write_text(CHATML)
    lines = [{"messages": CHAT}]
    generate(job(tmp_path, base_model, lines, chat_template=str(file)))
    run = json.loads((tmp_path / "out" / ".batchmix/run.json").read_text())
    assert run["identity"]["data.chat_template"] == run["config"]["data"]["chat_template"] == CHATML
    generate(job(tmp_path, base_model, lines, chat_template=str(copy)))
    file.write_text(CHATML + " ")
    for other in (str(file), "{{ bos_token }}"):
        with pytest.raises(BatchmixError, match=r"data\.chat_template was .*, is now "):
            generate(job(tmp_path, base_model, lines, chat_template=other))
