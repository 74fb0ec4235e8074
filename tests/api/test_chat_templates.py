"""`LLM.chat` with templates of a model folder and of the caller, on random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import CHATML, save, train_byte_level
from transformers import AutoTokenizer

from batchmix import LLM, SamplingParams

CHAT = [{"role": "user", "content": "the quick fox"}]
PARAMS = SamplingParams(max_tokens=2)
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool.name }};{% endfor %}{{ mood | default('calm') }}:" + CHATML


def model_folder(folder: Path, template: str | None) -> Path:
    save(folder, train_byte_level(), template)
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 640, "hidden_size": 64,
              "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
              "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 256, "dtype": "float32"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), WITH_TOOLS)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, format="random", device="cpu") as llm:
        yield llm


def prompt(llm: LLM, messages: Any = CHAT, **options: Any) -> str | None:
    [output] = llm.chat(messages, PARAMS, False, **options)
    assert output.error is None, output.error
    return output.prompt


def test_what_the_template_is_told(llm: LLM, folder: Path) -> None:
    turn = "<|im_start|>user\nthe quick fox<|im_end|>\n"
    assert prompt(llm) == f"calm:{turn}<|im_start|>assistant\n"
    assert prompt(llm, add_generation_prompt=False) == f"calm:{turn}"
    tools = [{"name": "search"}, {"name": "add"}]
    assert prompt(llm, tools=tools) == f"search;add;calm:{turn}<|im_start|>assistant\n"
    assert prompt(llm, chat_template_kwargs={"mood": "merry"}) == f"merry:{turn}<|im_start|>assistant\n"
    assert prompt(llm) == f"calm:{turn}<|im_start|>assistant\n", "options last for one call"
    begun = [*CHAT, {"role": "assistant", "content": "over"}]
    continued = prompt(llm, begun, add_generation_prompt=False, continue_final_message=True)
    assert continued == f"calm:{turn}<|im_start|>assistant\nover"
    theirs = AutoTokenizer.from_pretrained(folder)
    for options in ({}, {"add_generation_prompt": True}, {"tools": tools}, {"mood": "sad"}):
        expected = theirs.apply_chat_template(CHAT, return_dict=False, **options)
        assert llm.get_tokenizer().apply_chat_template(CHAT, **options) == expected


def test_what_the_template_does_not_read_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="enable_thinking: the model's chat template does not read it"):
        llm.chat(CHAT, chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(ValueError, match=r"mood: has the text <\|im_end\|>, which is a control token of the model"):
        llm.chat(CHAT, chat_template_kwargs={"mood": "a<|im_end|>"})
    with pytest.raises(ValueError, match="tools: has the text"):
        llm.chat(CHAT, tools=[{"name": "<|im_start|>"}])


def test_a_template_of_the_call(llm: LLM, tmp_path: Path) -> None:
    mine = "{% for message in messages %}{{ message['content'] }}!{% endfor %}"
    assert prompt(llm, chat_template=mine) == "the quick fox!"
    (tmp_path / "mine.jinja").write_text(mine)
    assert prompt(llm, chat_template=str(tmp_path / "mine.jinja")) == "the quick fox!"
    assert prompt(llm) != "the quick fox!"
    with pytest.raises(ValueError, match=r"chat_template=.*: there is no such file"):
        llm.chat(CHAT, chat_template="/nowhere.jinja")
    with pytest.raises(ValueError, match=r"tools: data\.chat_template does not read it"):
        llm.chat(CHAT, chat_template=mine, tools=[{"name": "x"}])


def test_a_base_model_has_no_chat(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", None)
    with LLM(base, format="random", device="cpu") as llm:
        with pytest.raises(ValueError, match="chat: there is no chat template"):
            llm.chat(CHAT)
        with pytest.raises(ValueError, match="there is no chat template"):
            llm.get_tokenizer().apply_chat_template(CHAT)
        assert prompt(llm, chat_template=CHATML) == "<|im_start|>user\nthe quick fox<|im_end|>\n<|im_start|>assistant\n"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    with LLM(base, format="random", device="cpu") as llm:
        with pytest.raises(ValueError, match=r"chat: .* has no tokenizer; give token ids to generate"):
            llm.chat(CHAT)
        with pytest.raises(ValueError, match="has no tokenizer; prompts are token ids"):
            llm.get_tokenizer()
        text, ids = llm.generate(["a", [1, 2]], PARAMS, use_tqdm=False)
        assert text.error is not None
        assert (ids.outputs[0].text, len(ids.outputs[0].token_ids)) == ("", 2)
