"""`LLM` as a user of vLLM writes it, with the built-in model."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import batchmix
from batchmix import LLM, RequestOutput, SamplingParams, StructuredOutputsParams

MESSAGES = [
    "The parcel never came.",
    "I was charged twice!",
    "How do I cancel?",
    "Thank you, great service",
    "Login fails",
]
CHATS = [[{"role": "user", "content": text}] for text in MESSAGES]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", max_num_seqs=8, sort_window=8) as llm:
        yield llm


def texts(outputs: list[RequestOutput]) -> list[list[str]]:
    return [[sample.text for sample in output.outputs] for output in outputs]


def job(tmp_path: Path, rows: list[dict[str, Any]], **keys: Any) -> list[dict[str, Any]]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {"data.path": tmp_path / "rows.jsonl", "output.dir": tmp_path / "out", "engine.device": "cpu"}
    run = batchmix.run("generate", overrides | {key.replace("__", "."): value for key, value in keys.items()})
    return list(run.table().to_pylist())


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_answers_are_those_of_a_job(llm: LLM, tmp_path: Path, temperature: float) -> None:
    keys = {"sampling__temperature": temperature, "sampling__seed": 7, "sampling__max_tokens": 12, "sampling__n": 2}
    rows = job(tmp_path, [{"prompt": text} for text in MESSAGES], data__chat_template="none", output__token_ids=True,
               **keys)  # fmt: skip
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=12, n=2)
    samples = [sample for output in llm.generate(MESSAGES, params, use_tqdm=False) for sample in output.outputs]
    assert [(row["generated_text"], row["finish_reason"]) for row in rows] == [
        (sample.text, sample.finish_reason) for sample in samples
    ]
    assert [row["generated_token_ids"] for row in rows] == [
        sample.token_ids[: -1 if sample.finish_reason == "stop" else None] for sample in samples
    ]


def test_chat_has_the_template_of_a_job(llm: LLM, tmp_path: Path) -> None:
    rows = job(tmp_path, [{"messages": chat} for chat in CHATS], sampling__temperature=0, sampling__max_tokens=40)
    outputs = llm.chat(CHATS, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    assert [row["generated_text"] for row in rows] == [output.outputs[0].text for output in outputs]
    assert [row["prompt_tokens"] for row in rows] == [len(output.prompt_token_ids or ()) for output in outputs]
    assert outputs[0].prompt == "<s> [INST] The parcel never came. [/INST]"
    [one] = llm.chat(CHATS[0], GREEDY, False)
    [tokens] = llm.generate(llm.get_tokenizer().apply_chat_template(CHATS[0]), GREEDY, use_tqdm=False)
    assert one.prompt_token_ids == tokens.prompt_token_ids
    assert one.outputs == tokens.outputs
    assert tokens.prompt is None


def test_every_form_of_a_conversation(llm: LLM) -> None:
    chat = [*CHATS[0], {"role": "assistant", "content": "Sorry."}, {"role": "user", "content": "Where is it?"}]
    parts = np.array([{"type": "text", "text": "The parcel never came."}], object)
    forms: list[Any] = [
        chat, tuple(chat), np.array(chat, object), deque(chat), [{"role": "user", "content": parts}, *chat[1:]],
    ]  # fmt: skip
    outputs = llm.chat(forms, GREEDY, False) + llm.chat(tuple(forms), GREEDY, False)
    for form in forms:
        outputs += llm.chat(form, GREEDY, False)  # one conversation by itself
    assert {output.error for output in outputs} == {None}
    assert len({tuple(output.prompt_token_ids or ()) for output in outputs}) == 1
    continued = np.array([*CHATS[0], {"role": "assistant", "content": "Sorry"}], object)
    [output] = llm.chat(continued, GREEDY, False, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt == "<s> [INST] The parcel never came. [/INST] Sorry"
    assert llm.get_tokenizer().apply_chat_template(np.array(chat, object)) == outputs[0].prompt_token_ids


def test_conversations_of_a_job_are_those_of_a_call(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    keys = {"data.path": tmp_path / "rows.jsonl", "output.dir": tmp_path / "out", "engine.device": "cpu"}
    frame = batchmix.run("generate", keys | {"sampling.temperature": 0, "sampling.max_tokens": 12}).to_pandas()
    assert isinstance(frame.messages[0], np.ndarray)
    for messages in (frame.messages.tolist(), frame.messages):
        outputs = llm.chat(messages, GREEDY, False)
        assert [output.outputs[0].text for output in outputs] == frame.generated_text.tolist()


def test_every_form_of_a_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("Hello")
    forms: list[Any] = [
        "Hello", {"prompt": "Hello"}, ids, tuple(ids), np.array(ids), torch.tensor(ids), {"prompt_token_ids": ids},
        {"prompt": "shown", "prompt_token_ids": ids}, deque(ids),
    ]  # fmt: skip
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    for form in forms:
        outputs += llm.generate(form, GREEDY, use_tqdm=False)  # one prompt by itself
    assert {tuple(output.prompt_token_ids or ()) for output in outputs} == {tuple(ids)}
    assert len({output.outputs[0].text for output in outputs}) == 1
    assert [output.request_id for output in outputs] == [*"012345678", *"0" * 9]
    assert [output.prompt for output in outputs[:9]] == ["Hello", "Hello", *[None] * 5, "shown", None]
    assert llm.generate([]) == []


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [text * (1 + number % 3) for number, text in enumerate(MESSAGES * 4)]
    params = [SamplingParams(temperature=0, max_tokens=1 + number % 7) for number in range(len(prompts))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    lengths = [(len(output.outputs[0].token_ids), output.outputs[0].finish_reason) for output in outputs]
    assert all(length == 1 + number % 7 or reason == "stop" for number, (length, reason) in enumerate(lengths))
    assert len({length for length, _ in lengths}) > 3


@pytest.mark.slow  # seconds
def test_an_iterator_gives_an_iterator_and_is_read_ahead_within_bounds(llm: LLM) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for number in itertools.count():
            read = number + 1
            yield f"{'word ' * (number % 50)}{number}"

    found = llm.generate(endless(), SamplingParams(max_tokens=8), use_tqdm=False)
    assert read == 0
    seen = [next(found) for _ in range(60)]
    numbers = [int(output.request_id) for output in seen]
    assert numbers != sorted(numbers), "the longest of a window run first"
    assert len(set(numbers)) == 60
    assert [output.prompt for output in seen] == [f"{'word ' * (number % 50)}{number}" for number in numbers]
    # Of the engine 8 rows run and 8 wait, the window has 8 more, and the tokenizer is given 512 at a time: 4 of these wait,
    # one is taken apart, one is read and one is being read.
    time.sleep(0.5)
    assert read <= 60 + 3 * 8 + 7 * 512
    found.close()
    assert texts(llm.generate(MESSAGES, GREEDY, use_tqdm=False)) == texts(
        llm.generate(MESSAGES, GREEDY, use_tqdm=False)
    )


def test_an_iterators_outputs_are_those_of_the_list(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, n=3, seed=1)
    listed = llm.generate(MESSAGES, params, use_tqdm=False)
    found = sorted(llm.generate(iter(MESSAGES), params, use_tqdm=False), key=lambda output: int(output.request_id))
    assert found == listed
    chats = sorted(llm.chat(iter(CHATS), params, False), key=lambda output: int(output.request_id))
    assert chats == llm.chat(CHATS, params, False)


def test_an_error_of_the_iterator_comes_out_and_the_llm_goes_on(llm: LLM) -> None:
    def failing() -> Iterator[str]:
        yield from MESSAGES
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(llm.generate(failing(), SamplingParams(max_tokens=50, ignore_eos=True), use_tqdm=False))
    assert len(llm.generate(MESSAGES, GREEDY, use_tqdm=False)) == 5


def test_one_call_at_a_time(llm: LLM) -> None:
    found = llm.generate(iter(MESSAGES), SamplingParams(max_tokens=30, ignore_eos=True), use_tqdm=False)
    next(found)
    with pytest.raises(RuntimeError, match="answering another call"):
        llm.generate("Hello", GREEDY)
    assert len(list(found)) == 4  # it was not disturbed
    assert len(llm.generate("Hello", GREEDY, use_tqdm=False)) == 1


def test_n_samples(llm: LLM) -> None:
    [output] = llm.generate("Hello", SamplingParams(n=5, max_tokens=8, seed=3), use_tqdm=False)
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3, 4]
    assert len({sample.text for sample in output.outputs}) > 1


@pytest.mark.slow  # loads the model three times
def test_a_seed_of_none_differs_between_calls_and_not_between_runs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8)
    with LLM("tiny", device="cpu") as first, LLM("tiny", device="cpu", seed=1) as other:
        one, two = (texts(first.generate(MESSAGES, params, use_tqdm=False)) for _ in range(2))
        third = texts(other.generate(MESSAGES, params, use_tqdm=False))
    with LLM("tiny", device="cpu", max_num_seqs=3) as again:
        assert [texts(again.generate(MESSAGES, params, use_tqdm=False)) for _ in range(2)] == [one, two]
    assert len({str(one), str(two), str(third)}) == 3
    seeded = SamplingParams(max_tokens=8, seed=5)
    assert texts(llm.generate(MESSAGES, seeded, use_tqdm=False)) == texts(
        llm.generate(MESSAGES, seeded, use_tqdm=False)
    )


def test_logprobs(llm: LLM) -> None:
    [output] = llm.generate("Hello", SamplingParams(logprobs=3, max_tokens=30, seed=2, temperature=2.0), use_tqdm=False)
    sample = output.outputs[0]
    assert sample.logprobs is not None
    assert len(sample.logprobs) == len(sample.token_ids)
    assert sample.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs, strict=True))
    )
    for token, entry in zip(sample.token_ids, sample.logprobs, strict=True):
        assert next(iter(entry)) == token
        best = sorted(entry.values(), key=lambda found: found.rank or 0)
        assert [found.rank for found in best][:3] == [1, 2, 3]
        assert [found.logprob for found in best] == sorted((found.logprob for found in best), reverse=True)
        assert len(entry) == (3 if (entry[token].rank or 0) <= 3 else 4)
        assert entry[token].decoded_token == llm.get_tokenizer()._tokenizer.token_bytes(False)[token].decode(
            errors="replace"
        )
    assert max(entry[token].rank or 0 for token, entry in zip(sample.token_ids, sample.logprobs, strict=True)) > 3
    [plain] = llm.generate("Hello", SamplingParams(logprobs=0, max_tokens=3), use_tqdm=False)
    assert [len(entry) for entry in plain.outputs[0].logprobs or ()] == [1, 1, 1]
    [none] = llm.generate("Hello", SamplingParams(max_tokens=3), use_tqdm=False)
    assert none.outputs[0].logprobs is None
    assert none.outputs[0].cumulative_logprob is None


def test_token_ids_end_with_what_ended_the_answer(llm: LLM) -> None:
    [output] = llm.chat(CHATS[0], SamplingParams(temperature=0, max_tokens=64), False)
    whole = output.outputs[0]
    assert (whole.finish_reason, whole.stop_reason, whole.token_ids[-1]) == ("stop", None, 2)
    tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(whole.token_ids, skip_special_tokens=True) == whole.text
    token = whole.token_ids[5]
    stopped = llm.chat(CHATS[0], SamplingParams(temperature=0, max_tokens=64, stop_token_ids=[token]), False)[
        0
    ].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    place = whole.token_ids.index(token)
    assert stopped.token_ids == whole.token_ids[: place + 1]
    cut = llm.chat(CHATS[0], SamplingParams(temperature=0, max_tokens=64, stop="topic"), False)[0].outputs[0]
    assert (cut.stop_reason, cut.text) == ("topic", whole.text.partition("topic")[0])
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
    cut_kept = llm.chat(
        CHATS[0], SamplingParams(temperature=0, max_tokens=64, stop="topic", include_stop_str_in_output=True), False
    )
    assert cut_kept[0].outputs[0].text == cut.text + "topic"


def test_no_limit_of_tokens_is_the_end_of_the_context() -> None:
    with LLM("tiny", device="cpu", max_model_len=40) as llm:
        [output] = llm.generate([[1, 5, 6]], SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 40 - 3
        assert output.outputs[0].finish_reason == "length"


def test_guided_answers(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    params = [
        SamplingParams(max_tokens=20, structured_outputs=StructuredOutputsParams(choice=["yes", "no"])),
        SamplingParams(max_tokens=20, structured_outputs=StructuredOutputsParams(regex="[ab]{3}")),
        SamplingParams(max_tokens=40, structured_outputs=StructuredOutputsParams(json=schema)),
        SamplingParams(
            max_tokens=40, structured_outputs=StructuredOutputsParams(choice=["a", "b"], score_choices=True)
        ),
    ]
    choice, regex, document, scored = (output.outputs[0] for output in llm.generate(["x"] * 4, params, use_tqdm=False))
    assert choice.text in ("yes", "no")
    assert set(regex.text) <= {"a", "b"}
    assert set(json.loads(document.text)) >= {"ok"}
    assert sum(scored.choice_probabilities or ()) == pytest.approx(1.0)


BAD = [
    "",
    None,
    5,
    [],
    [1, "2"],
    [1, 99_999],
    {"prompt": 3},
    {"prompt": "x", "multi_modal_data": {}},
    {"prompt": "x", "id": 3},
    {"text": "x"},
    {},
    b"a",
    {1, 2},
    {"prompt_token_ids": "ab"},
    "word " * 5000,
    "\ud800",
]


def test_a_bad_prompt_comes_back_with_its_error(llm: LLM) -> None:
    outputs = llm.generate(["good", *BAD, "good"], GREEDY, use_tqdm=False)
    assert [output.outputs[0].finish_reason == "error" for output in outputs] == [False, *[True] * len(BAD), False]
    first, *bad, last = outputs
    assert first.outputs == last.outputs
    assert (first.error, first.finished) == (None, True)
    for output in bad:
        assert output.prompt_token_ids is None
        assert [(sample.text, sample.token_ids) for sample in output.outputs] == [("", [])]
    assert [output.error for output in bad] == [
        "prompt is empty",
        "a prompt is a text, token ids or a mapping, not NoneType",
        "a prompt is a text, token ids or a mapping, not int",
        "prompt_token_ids is empty",
        "prompt_token_ids[1]='2' is not an integer",
        "prompt_token_ids[1]=99999 is outside the model's vocabulary of 32000",
        "prompt must be text, not int",
        "prompt: remove the key multi_modal_data; a prompt has prompt or prompt_token_ids",
        "prompt: remove the key id; a prompt has prompt or prompt_token_ids",
        "prompt: remove the key text; a prompt has prompt or prompt_token_ids",
        "prompt is a mapping without a prompt; a prompt has prompt or prompt_token_ids",
        "a prompt is a text, token ids or a mapping, not bytes",
        "a prompt is a text, token ids or a mapping, not set",
        "prompt_token_ids must be a list of token ids, not str",
        "prompt has 5002 tokens; at most 4095 fit model.max_model_len=4096",
        "prompt is not valid Unicode: lone surrogate U+D800 at 0",
    ]
    chats: list[Any] = [[], [{"role": "tool", "content": "x"}], [*CHATS[0], {"role": "assistant", "content": "a"}]]
    errors = [output.error for output in llm.chat(chats, GREEDY, False)]
    assert errors[:2] == [
        "messages is empty", "messages[0]: role 'tool' is not one of system, developer, user, assistant",
    ]  # fmt: skip
    assert "nothing left to answer" in str(errors[2])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_failed_prompts_are_counted_in_one_warning(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    llm.generate(["Hello", [1], "Hello"], GREEDY, use_tqdm=False)
    assert warnings(caplog) == []
    params = SamplingParams(n=2, max_tokens=2)
    outputs = llm.generate(["Hello", "", "word " * 5000, "word " * 5001], params, use_tqdm=False)
    assert [output.error is None for output in outputs] == [True, False, False, False]
    assert warnings(caplog) == [
        f"3 of 4 prompts could not be run; prompt 2: {outputs[2].error} (output.error has the reason of each)"
    ]
    caplog.clear()
    found = llm.generate(iter(["", *["Hello"] * 50]), SamplingParams(max_tokens=2), use_tqdm=False)
    while next(found).error is None:
        pass
    assert warnings(caplog) == []
    found.close()
    [message] = warnings(caplog)
    assert re.fullmatch(r"1 of \d+ prompts could not be run; prompt 0: prompt is empty \(output.*\)", message)


def test_first_prompts_that_all_fail_are_warned_of_at_once(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    found = llm.generate(iter([""] * 300), GREEDY, use_tqdm=False)
    while not warnings(caplog):
        next(found)
    [message] = warnings(caplog)
    assert re.fullmatch(r"none of the first 256 prompts could be run; prompt \d+: prompt is empty", message)
    list(found)
    assert warnings(caplog)[1:] == [
        "300 of 300 prompts could not be run; prompt 0: prompt is empty (output.error has the reason of each)"
    ]
    caplog.clear()
    llm.generate(["Hello", *[""] * 300], GREEDY, use_tqdm=False)  # errors come back first
    assert [message.partition(";")[0] for message in warnings(caplog)] == ["300 of 301 prompts could not be run"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": [99_999]}, "stop_token_ids has token 99999; the model's vocabulary has 32000"),
        ({"structured_outputs": StructuredOutputsParams(regex="(")}, "structured_outputs.regex"),
        (
            {"structured_outputs": StructuredOutputsParams(choice=["a" * 99]), "max_tokens": 1},
            "max_tokens=1: the shortest",
        ),
    ],
)
def test_parameters_that_the_model_cannot_work_with_are_refused_before_anything_runs(
    llm: LLM, params: dict[str, Any], message: str
) -> None:
    read: list[str] = []

    def prompts() -> Iterator[str]:
        read.append("x")
        yield "x"

    wrong = SamplingParams(**params)
    for call in (lambda: llm.generate(["a", "b"], [GREEDY, wrong]), lambda: llm.generate(prompts(), wrong)):
        with pytest.raises(ValueError, match=message.replace("(", "\\(")):
            call()
    assert read == []
    changed = SamplingParams()
    changed.top_p = 3.0
    with pytest.raises(ValueError, match=r"^top_p=3.0 must be above 0 and at most 1"):
        llm.generate("x", changed)


def test_wrong_arguments_of_a_call(llm: LLM) -> None:
    with pytest.raises(ValueError, match="sampling_params: 1 for 2 prompts; give as many, or one for all"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(TypeError, match="sampling_params: must be SamplingParams, not dict"):
        llm.generate(["a"], [{"max_tokens": 3}])  # type: ignore[list-item]
    for prompts in ("a", ["a", "b"], iter(["a"])):
        with pytest.raises(
            TypeError, match=r"^sampling_params: must be SamplingParams, not dict; use SamplingParams\(\*\*"
        ):
            llm.generate(prompts, {"max_tokens": 4})
    for wrong in (5, "greedy"):
        with pytest.raises(TypeError, match=f"^sampling_params: must be SamplingParams, not {type(wrong).__name__}$"):
            llm.generate(["a"], wrong)
    with pytest.raises(TypeError, match=r"^generate: prompt_token_ids is not there; give the token ids as the prompts"):
        llm.generate(prompt_token_ids=[[1, 2]], sampling_params=GREEDY)  # type: ignore[call-overload]  # as in old vLLM
    with pytest.raises(TypeError, match=r"^prompts must be text, .*, not NoneType"):
        llm.generate()  # type: ignore[call-overload]  # is refused
    with pytest.raises(TypeError, match="for an iterator of prompts give one"):
        llm.generate(iter(["a"]), [GREEDY])
    with pytest.raises(TypeError, match="prompts must be text, token ids"):
        llm.generate(5)
    with pytest.raises(TypeError, match=r"prompts must be text, token ids, .*, not bytes"):
        llm.generate(b"a")
    with pytest.raises(TypeError, match=r"generate: lora_request is not there; merge the adapter"):
        llm.generate("a", GREEDY, lora_request=object())
    llm.generate("a", GREEDY, use_tqdm=False, lora_request=None)
    with pytest.raises(TypeError, match=r"generate: there is no argument use_tqdn; did you mean use_tqdm\?"):
        llm.generate("a", GREEDY, use_tqdn=False)
    with pytest.raises(ValueError, match="add_generation_prompt=False"):
        llm.chat(CHATS[0], continue_final_message=True)
    with pytest.raises(ValueError, match="tools: Mistral's chat format"):
        llm.chat(CHATS[0], tools=[{"type": "function"}])
    with pytest.raises(TypeError, match="messages must be a list"):
        llm.chat("Hello")


def test_the_last_message_is_continued(llm: LLM) -> None:
    chat = [*CHATS[0], {"role": "assistant", "content": '{"sentiment":'}]
    [output] = llm.chat(chat, GREEDY, False, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt == '<s> [INST] The parcel never came. [/INST] {"sentiment":'
    [wrong] = llm.chat(CHATS[0], GREEDY, False, add_generation_prompt=False, continue_final_message=True)
    assert wrong.error == "continue_final_message: the last message is not the assistant's"


def test_text_that_is_rendered_already_is_warned_of(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    llm._stage.builder._texts.warns = True  # type: ignore[union-attr]  # once for each LLM
    for _ in range(2):
        llm.generate("<s>[INST] Hello [/INST]", GREEDY, use_tqdm=False)
    [message] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith(
        "row 0: its text holds <s>, which is encoded as text, not as the control token; give messages"
    )


def test_what_vllm_has_and_we_have_not_is_named(llm: LLM) -> None:
    for name in ("sleep", "beam_search", "encode", "embed", "classify", "collective_rpc", "score", "llm_engine"):
        with pytest.raises(AttributeError, match=rf"LLM\.{name} is not there; \w+"):
            getattr(llm, name)
    with pytest.raises(AttributeError, match="'LLM' object has no attribute 'generat'"):
        llm.generat  # noqa: B018


def test_the_tokenizer(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (32000, 1, 2)
    ids = tokenizer.encode("Hello </s>")
    assert ids[0] == 1
    assert 2 not in ids, "a text never becomes control tokens"
    assert tokenizer.encode("Hello </s>", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello </s>"
    assert tokenizer.decode(2) == "</s>"
    for wrong in ([{"role": "x", "content": "a"}], [*CHATS[0], {"role": "assistant", "content": "a"}]):
        with pytest.raises(ValueError, match="messages"):
            tokenizer.apply_chat_template(wrong)
    with pytest.raises(ValueError, match="tokenize=False is not there"):
        tokenizer.apply_chat_template(CHATS[0], tokenize=False)


def test_use_tqdm(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(MESSAGES, GREEDY)
    assert "Processed prompts: 100%" in capsys.readouterr().err
    calls: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            calls.append(options["total"])

        def update(self, count: int) -> None:
            calls.append(count)

        def close(self) -> None:
            calls.append("closed")

    llm.generate(MESSAGES, GREEDY, use_tqdm=Bar)
    assert calls == [5, 1, 1, 1, 1, 1, "closed"]
    llm.generate(MESSAGES, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_no_handlers_outside_the_main_thread(llm: LLM) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    found: list[Any] = []

    def ask() -> None:
        try:
            found.extend(llm.generate(MESSAGES, GREEDY, use_tqdm=False))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert [output.outputs[0].finish_reason for output in found] == ["length"] * 5
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_while_an_iterator_waits_the_handler_is_the_one_before(llm: LLM) -> None:
    before = signal.getsignal(signal.SIGINT)
    found = llm.generate(iter(MESSAGES), GREEDY, use_tqdm=False)
    next(found)
    assert signal.getsignal(signal.SIGINT) is before
    found.close()


def test_closed(caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM("tiny", device="cpu", max_num_seqs=2)
    found = llm.generate(iter(MESSAGES), GREEDY, use_tqdm=False)
    next(found)
    llm.close()
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        list(found)
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.generate("Hello", GREEDY)
    assert llm._session._executor is None
    llm.close()


INTERRUPTED = """
import sys, threading, signal, os, time
from batchmix import LLM, SamplingParams

llm = LLM("tiny", device="cpu", max_num_seqs=4)
before = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
long = SamplingParams(max_tokens=None, ignore_eos=True)
print("ready", flush=True)
started = time.monotonic()
try:
    llm.generate(["Hello"] * 500, long, use_tqdm=False)
except KeyboardInterrupt:
    print("interrupted", flush=True)
assert llm.generate("Hello", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False) == before
print("ready", flush=True)
try:
    for output in llm.generate((f"Hello {i}" for i in range(10**9)), long, use_tqdm=False):
        pass
except KeyboardInterrupt:
    print("interrupted", flush=True)
assert llm.generate("Hello", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False) == before
print("the same", flush=True)
"""


@pytest.mark.slow  # starts a process that loads the model
def test_ctrl_c() -> None:
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for _ in range(2):
            assert process.stdout.readline() == "ready\n"
            time.sleep(3)
            sent = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
            assert time.monotonic() - sent < 20
        assert process.communicate(timeout=60)[0] == "the same\n"
    finally:
        process.kill()
    assert process.returncode == 0


def test_import_is_light() -> None:
    script = "import sys, batchmix; print(sorted({'torch', 'numpy', 'hydra', 'transformers'} & set(sys.modules)), dir(batchmix))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] [")
    for name in batchmix.__all__:
        assert repr(name) in done.stdout
        assert getattr(batchmix, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'batchmix' has no attribute 'LM'"):
        batchmix.LM  # noqa: B018


def test_defaults_of_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Path(batchmix.__file__).parent / "models/tiny"
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(source / name)
    settings = {"temperature": 0.25, "top_k": 50, "top_p": 0.5, "max_new_tokens": 3, "repetition_penalty": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with LLM(folder, device="cpu") as llm:
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.25, 0, 0.5, 3)
        [output] = llm.generate("Hello", use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 3
    assert "not used" not in caplog.text
    with LLM(folder, device="cpu", generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


@pytest.mark.slow  # starts a process for the second rank, twice
def test_two_ranks_answer_one_call_after_another(llm: LLM) -> None:
    with (
        LLM("tiny", device="cpu", tensor_parallel_size=2, dtype="float32") as two,
        LLM("tiny", device="cpu", dtype="float32") as one,
    ):
        expected = texts(one.generate(MESSAGES, GREEDY, use_tqdm=False))
        for _ in range(2):
            assert texts(two.generate(MESSAGES, GREEDY, use_tqdm=False)) == expected
        found = two.generate(iter(MESSAGES), SamplingParams(max_tokens=50, ignore_eos=True), use_tqdm=False)
        next(found)
        found.close()
        assert two._session._executor is None, "what the other rank has is not known, so it is started again"
        assert texts(two.generate(MESSAGES, GREEDY, use_tqdm=False)) == expected
