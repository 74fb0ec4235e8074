"""Guided runs as a user starts them: keys, refusals before the model loads, rows of their own kind, output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from hydra import compose, initialize_config_module

from batchmix import pipeline
from batchmix.config import Config
from batchmix.config_checks import check
from batchmix.distributed import executor
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.hydra_app import register, to_config
from batchmix.input.config import DataConfig
from batchmix.output.config import OutputConfig
from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.sampling_checks import override_sampling

jsonschema = pytest.importorskip("jsonschema")  # of the `annotate` extra

TICKET = {
    "type": "object",
    "properties": {"sentiment": {"enum": ["positive", "negative"]}, "topic": {"type": "string", "maxLength": 12}},
    "required": ["sentiment", "topic"],
}  # fmt: skip


def job(folder: Path, rows: list[dict[str, Any]], **sampling: Any) -> Config:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        data=DataConfig(path=str(folder / "rows.jsonl")),
        sampling=SamplingConfig(**{"max_tokens": 40, **sampling}),
        engine=EngineConfig(device="cpu"),
        output=OutputConfig(dir=str(folder / "out")),
    )


def answers(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ds.dataset(folder / "out", format="arrow").to_table().sort_by("row").to_pylist()
    return found


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def start_engine(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(executor, "start_engine", start_engine)


@pytest.mark.parametrize(
    ("outputs", "sampling", "reason"),
    [
        ({"json": {"type": "array", "contains": {}}}, {}, "json: the schema has the keyword 'contains'"),
        ({"json": '{"type": "array", "uniqueItems": true}'}, {}, "json: the schema has the keyword 'uniqueItems'"),
        ({"json": "schema.json"}, {}, "json: no JSON .*; give a mapping or JSON text, a file is not read"),
        ({"regex": "(?=a)b"}, {}, "regex: .*look-around"),
        ({"json": TICKET}, {"max_tokens": 5}, r"max_tokens=5: the shortest text .* has \d+ tokens"),
        ({"regex": "a", "choice": ["a"]}, {}, "has choice and regex; give one of"),
        ({}, {}, "has nothing; give one of"),
        ({"choice": ["a", "a"]}, {}, "has a text twice"),
        ({"choice": ["a", ""]}, {}, "texts that are not empty"),
        ({"choice": ["a"]}, {"stop": ["b"]}, "sampling.stop does not go with"),
        ({"regex": "a", "score_choices": True}, {}, "score_choices needs"),
        ({"choice": ["a"], "score_choices": True}, {"logprobs": 1}, "sampling.logprobs does not go with"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_loads(tmp_path, no_model, outputs, sampling, reason):
    config = job(tmp_path, [{"prompt": "x"}], structured_outputs=StructuredOutputs(**outputs), **sampling)
    with pytest.raises(BatchmixError, match=reason):
        pipeline.generate(check(config))
    assert not (tmp_path / "out").exists()


def test_rows_may_have_grammars_of_their_own(tmp_path):
    pytest.importorskip("llguidance")  # which takes one of them
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "sampling": {"structured_outputs": {"choice": ["yes", "no"]}}},
        {"prompt": "b", "sampling": {"structured_outputs": {"regex": "[0-9]{3}"}, "n": 1}},
        {"prompt": "c"},
        {"prompt": "d", "sampling": {"structured_outputs": {"regex": "(a|b)*a(a|b){30}"}, "max_tokens": 9, "n": 2}},
        {"prompt": "e", "sampling": {"structured_outputs": {"json": {"contains": {}}}}},
        {"prompt": "f", "sampling": {"structured_outputs": {"grammar": "x"}}},
        {"prompt": "g", "sampling": {"structured_outputs": {"regex": "a{900}"}}},
    ]
    pipeline.generate(job(tmp_path, rows, structured_outputs=StructuredOutputs(json=json.dumps(TICKET))))
    found = answers(tmp_path)
    assert found[0]["generated_text"] in ("yes", "no")
    assert found[1]["generated_text"].isdecimal()
    jsonschema.validate(json.loads(found[2]["generated_text"]), TICKET)
    assert [row["finish_reason"] for row in found[3:]] == ["error"] * 5
    assert [(row["row"], row["sample_index"], row["completion_tokens"]) for row in found[3:5]] == [(3, 0, 9), (3, 1, 9)]
    cut = "after 9 tokens the text was not whole"
    reasons = cut, cut, "keyword 'contains'", "no key 'grammar'", "max_tokens=40"
    for row, reason in zip(found[3:], reasons, strict=True):
        assert reason in row["error"]
    summary = json.loads((tmp_path / "out" / ".batchmix/summary.json").read_text())
    assert summary["jump_forward_tokens"] > 5
    assert (summary["rows"], summary["error_rows"], summary["samples"]) == (7, 4, 8)
    assert (summary["runs"][0]["rows"], summary["runs"][0]["error_rows"]) == (7, 4)
    assert json.loads((tmp_path / "out" / ".batchmix/run.json").read_text())["versions"]["llguidance"]
    with pytest.raises(BatchmixError, match=r"sampling\.structured_outputs was"):
        pipeline.generate(job(tmp_path, rows, structured_outputs=StructuredOutputs(choice=["x"])))


def test_probabilities_of_scored_choices_are_a_column(tmp_path):
    outputs = StructuredOutputs(choice=["positive", "negative", "neutral"], score_choices=True)
    pipeline.generate(job(tmp_path, [{"prompt": "Great!"}, {"prompt": 5}], structured_outputs=outputs, temperature=0.0))
    good, bad = answers(tmp_path)
    assert sum(good["choice_probabilities"]) == pytest.approx(1)
    best = max(range(3), key=good["choice_probabilities"].__getitem__)
    assert good["generated_text"] == (outputs.choice or [])[best]
    assert bad["choice_probabilities"] is None


@pytest.fixture
def hydra() -> Iterator[None]:
    register("generate")
    with initialize_config_module("batchmix.conf", version_base="1.3"):
        yield


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sampling.structured_outputs.choice=[a,'b c']", StructuredOutputs(choice=["a", "b c"])),
        ("sampling.structured_outputs.regex='[a-z]{2}'", StructuredOutputs(regex="[a-z]{2}")),
        ("sampling.structured_outputs.json={type: array, items: {enum: [1, x]}}",
         StructuredOutputs(json={"type": "array", "items": {"enum": [1, "x"]}})),
        ("sampling.seed=1", None),
    ],
)  # fmt: skip
def test_keys_on_the_command_line(hydra, override, expected):
    overrides = ["data.path=rows.jsonl", "output.dir=out", override]
    assert to_config(compose("generate", overrides=overrides), "generate").sampling.structured_outputs == expected


@pytest.mark.parametrize("value", [5, {"choice": "a"}, {"regex": 5}, {"json": [1]}, {"choice": ["\ud800"]}])
def test_a_wrong_value_in_a_row(value):
    with pytest.raises(ValueError, match=r"^sampling\.structured_outputs"):
        override_sampling(SamplingConfig(), {"structured_outputs": value})


def test_a_row_that_asks_for_log_probabilities_keeps_its_grammar():
    """Both at once are refused; what the run asks for every token gives way to what the row asks for."""
    run = SamplingConfig(structured_outputs=StructuredOutputs(regex="a", token_probabilities=True))
    row = override_sampling(run, {"logprobs": 0})
    assert (row.logprobs, row.structured_outputs) == (0, StructuredOutputs(regex="a"))
    own = {"regex": "b", "token_probabilities": True}
    with pytest.raises(ValueError, match=r"sampling\.logprobs does not go with .*token_probabilities"):
        override_sampling(run, {"logprobs": 0, "structured_outputs": own})
