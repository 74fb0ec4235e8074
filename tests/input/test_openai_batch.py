from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig, DataFormat, ShardConfig
from batchmix.input.openai_batch import OPENAI_SCHEMA, is_request, read_request
from batchmix.input.rowset import RowSet
from batchmix.input.source import open_source
from batchmix.output.part_formats import OpenAIParts
from batchmix.records import Completion, InputRow, Prompt
from batchmix.sampling import SamplingConfig
from batchmix.sampling_checks import override_sampling

MESSAGES = [{"role": "user", "content": "hi"}]


def request(url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": "r-1", "method": "POST", "url": url, "body": {"model": "m", "messages": MESSAGES, **body}}


def read(**body: Any) -> InputRow:
    return read_request(7, request(**body))


def test_a_request_becomes_a_row() -> None:
    row = read(max_tokens=5, temperature=0, stop=["x"], logit_bias={"5": -1}, top_p=None, user="u", stream=False)
    assert row == InputRow(
        7,
        "r-1",
        {"custom_id": "r-1", "model": "m", "messages": MESSAGES, "prompt": None},
        {"max_tokens": 5, "temperature": 0, "stop": ["x"], "logit_bias": {"5": -1}},
    )
    assert override_sampling(SamplingConfig(), row.sampling or {}).logit_bias == {5: -1.0}


def test_a_completion_request() -> None:
    row = read_request(0, {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "hi", "logprobs": 0}})
    assert row.columns == {"custom_id": "a", "model": None, "messages": None, "prompt": "hi"}
    assert row.text == "hi"
    assert row.sampling == {"logprobs": 0}
    assert row.error is None


SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


@pytest.mark.parametrize(
    ("body", "sampling"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 7, "max_tokens": 5}, {"max_tokens": 7}),
        ({"max_tokens": 5, "max_completion_tokens": None}, {"max_tokens": 5}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": False}, {}),
        ({"logprobs": "yes"}, {"logprobs": "yes"}),  # refused where sampling is checked
        ({"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "best_of": 1}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json": {"type": "object"}}}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "t", "strict": True, "schema": SCHEMA},
                }
            },
            {"structured_outputs": {"json": SCHEMA}},
        ),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"structured_outputs": {"json": SCHEMA}}),
        ({"structured_outputs": {"json_object": True}}, {"structured_outputs": {"json": {"type": "object"}}}),
        ({"structured_outputs": {"choice": ["a"]}}, {"structured_outputs": {"choice": ["a"]}}),
        ({"guided_json": SCHEMA}, {"structured_outputs": {"json": SCHEMA}}),
        ({"guided_regex": "a+", "guided_choice": None}, {"structured_outputs": {"regex": "a+"}}),
    ],
)
def test_sampling(body: dict[str, Any], sampling: dict[str, Any]) -> None:
    row = read(**body)
    assert row.error is None
    assert row.sampling == sampling


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"body": {}}, "custom_id must be a text, not None"),
        ({**request(), "custom_id": 5}, "custom_id must be a text, not 5"),
        ({**request(), "custom_id": ""}, "custom_id must be a text, not ''"),
        ({**request(), "custom_id": "\ud800"}, r"custom_id '\ud800' is no text"),
        ({**request(), "body": None}, "body must be an object, not None"),
        ({**request(), "body": []}, "body must be an object, not []"),
        (request(messages=None), "body.messages is missing"),
        (request(messages=None, prompt=[1, 2]), "body.prompt must be a text, not [1, 2]"),
        (request(url="/v1/embeddings"), "url '/v1/embeddings' is not one of"),
        (request(messages=None, prompt="hi"), "body.prompt is for /v1/completions; the url /v1/chat/completions needs"),
        (request(prompt="hi"), "body.messages is for /v1/chat/completions; body.prompt is for /v1/completions"),
        (request(url="/v1/completions"), "body.messages is for /v1/chat/completions; the url is for /v1/completions"),
        (request(tools=[{"type": "function"}]), "body key 'tools' with the value"),
        (request(response_format={"type": "grammar"}), "body.response_format {'type': 'grammar'} is not supported"),
        (request(response_format={"type": "json_schema"}), "body.response_format {'type': 'json_schema'} is not"),
        (request(response_format={"type": "json_schema", "json_schema": {}}), "json_schema.schema must be an object"),
        (request(response_format="json"), "body.response_format 'json' is not supported"),
        (request(structured_outputs=[1]), "body.structured_outputs must be an object, not [1]"),
        (request(structured_outputs={"json_object": "yes"}), "json_object must be true or false, not 'yes'"),
        (request(structured_outputs={"regex": "a"}, guided_regex="b"), "guided_regex and structured_outputs.regex"),
        (request(structured_outputs={"regex": "a"}, response_format={"type": "json_object"}), "leave one out"),
        (request(reasoning="\ud800\n"), r"body key 'reasoning' with the value '\ud800\n' is not supported"),
    ],
)
def test_a_request_that_cannot_be_run(record: dict[str, Any], reason: str) -> None:
    row = read_request(3, record)
    assert row.error is not None
    assert reason in row.error
    assert row.error.isprintable()
    assert list(row.columns) == OPENAI_SCHEMA.names
    row.id.encode()


def test_batch_files_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("not json\n" + json.dumps(request()) + "\n[1]\n" + json.dumps({"custom_id": "x"}) + "\n")
    source = open_source(DataConfig(str(path)), ShardConfig())
    rows = list(source.rows(RowSet()))
    assert source.openai_batch
    assert source.schema == OPENAI_SCHEMA
    assert [row.id for row in rows] == ["0", "r-1", "2", "x"]
    assert [row.error is None for row in rows] == [False, True, False, False]
    assert is_request(request())
    assert not is_request({"custom_id": "x"})
    kept = open_source(DataConfig(str(path), columns=["custom_id"]), ShardConfig())
    assert kept.schema == pa.schema([("custom_id", pa.string())])
    assert next(row for row in kept.rows(RowSet()) if row.row == 1).columns["messages"] == MESSAGES


def test_lines_that_are_not_requests_make_error_rows_where_the_format_is_given(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text('{"prompt": "x"}\n')
    (row,) = open_source(DataConfig(str(path), format=DataFormat.openai_batch), ShardConfig()).rows(RowSet())
    assert row.error == "custom_id must be a text, not None"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"columns": ["custom"]}, "no column 'custom' (data.columns); it has custom_id, model, messages, prompt"),
        ({"id_column": "model"}, "data.id_column=model: OpenAI batch files have their custom_id"),
        ({"messages_column": "chat"}, "data.messages_column=chat"),
        ({"template": "{{ text }}"}, "no column 'text' (data.template)"),
        ({"system_prompt": "{{ text }}"}, "no column 'text' (data.system_prompt)"),
        ({"system_prompt_column": "text"}, "no column 'text' (data.system_prompt_column)"),
    ],
)
def test_options_that_do_not_go_with_batch_files(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(request()) + "\n")
    with pytest.raises(BatchmixError) as caught:
        open_source(DataConfig(str(path), **options), ShardConfig())
    assert reason in str(caught.value)
    other = tmp_path / "b.jsonl"
    other.write_text('{"prompt": "x"}\n')
    with pytest.raises(BatchmixError, match=r"b.jsonl: OpenAI batch files cannot be mixed"):
        open_source(DataConfig([str(path), str(other)]), ShardConfig())


def test_responses_are_read_back_as_rows() -> None:
    def prompt(row: int) -> Prompt:
        return Prompt(row, f"c{row}", {}, [1, 2, 3], SamplingConfig(n=2))

    done = [Completion(prompt(7), sample, [5], "stop", num_tokens=2, text=f"text {sample}") for sample in range(2)]
    form = OpenAIParts("m")
    rows = form.rows(form.records([*done, Completion.failed(prompt(8), "too long", 0)]))
    assert rows == [
        {"row": 7, "id": "c7", "sample_index": 0, "generated_text": "text 0", "finish_reason": "stop", "prompt_tokens": 3,
         "completion_tokens": 4, "error": None},
        {"row": 8, "id": "c8", "sample_index": 0, "generated_text": None, "finish_reason": "error", "prompt_tokens": None,
         "completion_tokens": None, "error": "too long"},
    ]  # fmt: skip
