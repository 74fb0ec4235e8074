"""`SamplingParams` and `StructuredOutputsParams`: vLLM's names and defaults, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pydantic
import pytest

from batchmix import SamplingParams, StructuredOutputsParams
from batchmix.api.outputs import request_output
from batchmix.api.sampling_params import NOT_THERE
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig
from batchmix.sampling_checks import override_sampling


def test_every_key_of_a_job_is_there() -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams)} == {
        field.name for field in dataclasses.fields(SamplingConfig)
    }


def test_defaults_are_vllms_where_a_jobs_differ() -> None:
    ours, job = SamplingParams(), SamplingConfig()
    differ = {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(job, f.name)}
    assert differ == {"max_tokens", "seed"}
    assert (ours.max_tokens, ours.seed) == (16, None)


def test_the_order_of_arguments_is_vllms() -> None:
    params = SamplingParams(2, 0.1, 0.2, 1.3, 0.4, 0.5, 6, 0.7, 8, "stop", [9], True, 10, 1, 2)
    assert params == SamplingParams(
        n=2, presence_penalty=0.1, frequency_penalty=0.2, repetition_penalty=1.3, temperature=0.4, top_p=0.5, top_k=6,
        min_p=0.7, seed=8, stop="stop", stop_token_ids=[9], ignore_eos=True, max_tokens=10, min_tokens=1, logprobs=2,
    )  # fmt: skip


def test_as_overrides_of_a_row() -> None:
    params = SamplingParams(
        stop="a", stop_token_ids=(5, 6), allowed_token_ids=range(3), logit_bias={"7": 1.0}, logprobs=True,
        structured_outputs=None,
    )  # fmt: skip
    sampling = override_sampling(SamplingConfig(max_tokens=9, seed=9), params.overrides(11, 12))
    assert (sampling.stop, sampling.stop_token_ids, sampling.allowed_token_ids) == (["a"], [5, 6], [0, 1, 2])
    assert (sampling.logit_bias, sampling.logprobs, sampling.seed, sampling.max_tokens) == ({7: 1.0}, 1, 11, 16)
    assert override_sampling(SamplingConfig(), SamplingParams(max_tokens=None).overrides(11, 12)).max_tokens == 12
    assert SamplingParams(seed=0).overrides(11, 12)["seed"] == 0
    assert SamplingParams(seed=-1).overrides(11, 12)["seed"] == 11


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, r"^temperature=-1.0 must be at least 0"),
        ({"top_p": 0}, r"^top_p=0.0 must be above 0 and at most 1"),
        ({"n": 0}, r"^n=0 must be at least 1"),
        ({"max_tokens": 0}, r"^max_tokens=0 must be at least 1"),
        ({"min_tokens": 20}, r"^min_tokens=20 is above max_tokens=16"),
        ({"logprobs": -1}, r"^logprobs=-1 must be at least 0 and at most 100"),
        ({"stop": ["a", ""]}, r"^stop has an empty string"),
        ({"stop": 5}, r"'int' object is not iterable"),
        ({"stop_token_ids": ["x"]}, r"^stop_token_ids=\['x'\] is of the wrong type"),
        ({"temperature": "hot"}, r"^temperature='hot' is of the wrong type"),
        (
            {"stop": "x", "structured_outputs": StructuredOutputsParams(regex="a")},
            r"^stop does not go with structured_outputs",
        ),
    ],
)
def test_values_are_checked_at_once(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SamplingParams(**values)


def test_a_name_that_is_not_there_says_what_to_use() -> None:
    for name, remedy in NOT_THERE.items():
        with pytest.raises(TypeError) as raised:
            SamplingParams(**{name: 3})
        assert str(raised.value) == f"SamplingParams: {name} is not there; {remedy}"
        SamplingParams(**{name: None})  # asks for nothing
    SamplingParams(best_of=1, detokenize=True, bad_words=[], spaces_between_special_tokens=True)
    with pytest.raises(TypeError, match=r"there is no argument max_token; did you mean max_tokens\?"):
        SamplingParams(max_token=3)
    for name, key in {"guided_json": "json", "guided_jso": "json", "guided_regex": "regex"}.items():
        with pytest.raises(TypeError, match=rf"use structured_outputs=StructuredOutputsParams\({key}="):
            SamplingParams(**{name: {}})
    with pytest.raises(TypeError, match="structured_outputs must be StructuredOutputsParams, not dict"):
        SamplingParams(structured_outputs={"regex": "a"})


def test_an_attribute_that_is_not_there_is_refused() -> None:
    params = SamplingParams()
    params.temperature = 0.5
    with pytest.raises(
        AttributeError, match=r"^SamplingParams: there is no attribute temprature; did you mean temperature\?$"
    ):
        params.temprature = 0  # type: ignore[attr-defined]  # a typo
    with pytest.raises(AttributeError, match=r"^SamplingParams: bad_words is not there; use logit_bias"):
        params.bad_words = ["a"]  # type: ignore[attr-defined]  # not there
    structured = StructuredOutputsParams(regex="a")
    structured.regex = "b"
    with pytest.raises(
        AttributeError, match=r"^StructuredOutputsParams: there is no attribute regx; did you mean regex\?$"
    ):
        structured.regx = "c"  # type: ignore[attr-defined]  # a typo
    with pytest.raises(AttributeError, match=r"^StructuredOutputsParams: grammar is not there; write it as a regex"):
        structured.grammar = "root ::= x"  # type: ignore[attr-defined]  # not there
    params.structured_outputs = structured
    for copied in (params.clone(), pickle.loads(pickle.dumps(params)), copy.copy(params)):
        assert copied == params


def test_structured_outputs() -> None:
    assert StructuredOutputsParams(json_object=True).overrides() == {"json": {"type": "object"}}
    assert StructuredOutputsParams(choice=("a", "b"), score_choices=True).overrides() == {
        "choice": ["a", "b"], "score_choices": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="StructuredOutputsParams has nothing; give one of json"):
        StructuredOutputsParams()
    with pytest.raises(ValueError, match="StructuredOutputsParams has json and regex; give one"):
        StructuredOutputsParams(json={}, regex="a")
    with pytest.raises(TypeError, match="StructuredOutputsParams: grammar is not there; write it as a regex"):
        StructuredOutputsParams(grammar="root ::= x")
    with pytest.raises(ValueError, match="choice must be a list of texts"):
        SamplingParams(structured_outputs=StructuredOutputsParams(choice="ab"))


def test_a_pydantic_class_is_a_schema() -> None:
    class Ticket(pydantic.BaseModel):
        urgent: bool

    params = SamplingParams(structured_outputs=StructuredOutputsParams(json=Ticket))
    assert params.overrides(0, 1)["structured_outputs"] == {"json": Ticket.model_json_schema()}
    assert params.clone() == params
    with pytest.raises(ValueError, match=r"^structured_outputs\.json=dict is no pydantic class; give a JSON Schema"):
        StructuredOutputsParams(json=dict)


def test_a_clone_is_no_alias() -> None:
    params = SamplingParams(stop=["a"])
    other = params.clone()
    assert other == params
    other.stop.append("b")  # type: ignore[union-attr]
    assert params.stop == ["a"]


def test_a_sample_that_failed() -> None:
    prompt = Prompt(3, "3", {}, [1, 2], SamplingConfig(n=2))
    samples = [Completion(prompt, 0, [4], "length", text="x"), Completion.failed(prompt, "cut", 1)]
    output = request_output(samples, "p", None)
    assert (output.error, [sample.finish_reason for sample in output.outputs]) == ("cut", ["length", "error"])
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("3", "p", [1, 2])
