"""Rows to prompts: whatever a row holds, it becomes a prompt or an error of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompts import build_prompts

from batchmix.checkpoints.checkpoint import TINY
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig, DataFormat, ShardConfig
from batchmix.input.rowset import RowSet
from batchmix.input.source import open_source
from batchmix.observability.clock import StageClock
from batchmix.prompts.tokenizer import load_tokenizer
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig
from batchmix.templates.template import RowTemplate


def prompts(path: Path, sampling: SamplingConfig | None = None, **options: Any) -> list[Prompt]:
    data = DataConfig(str(path), **options)
    source = open_source(data, ShardConfig())
    return list(
        build_prompts(
            source.rows(RowSet()),
            data=data,
            sampling=sampling or SamplingConfig(),
            tokenizer=load_tokenizer(TINY),
            max_model_len=4096,
            vocab_size=32000,
            keep=source.schema.names,
            eos_token_ids=[2],
            clock=StageClock(),
        )
    )


WRONG_SAMPLINGS = {
    '{"max_tokens": Infinity}': "sampling.max_tokens=inf is of the wrong type",
    '{"max_tokens": NaN}': "sampling.max_tokens=nan is of the wrong type",
    '{"max_tokens": 100000000000}': "sampling.max_tokens=100000000000 must be at least 1 and at most 2147483647",
    '{"max_tokens": 2.5}': "sampling.max_tokens=2.5 is of the wrong type",
    '{"top_k": 1e20}': "sampling.top_k=100000000000000000000 must be at least -1 and at most 2147483647",
    '{"n": 1000000000000}': "sampling.n=1000000000000 must be at least 1 and at most 10000",
    '{"logprobs": 40000}': "sampling.logprobs=40000 must be at least 0 and at most 100",
    '{"temperature": 1e400}': "sampling.temperature=inf is no number",
    '{"temperature": NaN}': "sampling.temperature=nan is no number",
    '{"temperature": 1' + 400 * "0" + "}": "is of the wrong type",
    '{"repetition_penalty": Infinity}': "sampling.repetition_penalty=inf is no number",
    '{"logit_bias": {"5": NaN}}': "sampling.logit_bias has nan for token 5",
    '{"logit_bias": {"5": 1' + 400 * "0" + "}}": "is of the wrong type",
    '{"logit_bias": {"x": 1}}': "sampling.logit_bias={'x': 1} is of the wrong type",
    '{"logit_bias": [5]}': "sampling.logit_bias=[5] is of the wrong type",
    '{"seed": 9223372036854775808}': "must be at least -9223372036854775808 and at most 9223372036854775807",
    '{"stop": ["' + 1025 * "x" + '"]}': "sampling.stop has 1025 bytes in all; at most 1024 can be searched for",
    '{"top_p": "' + 3000 * "x" + '"}': "is of the wrong type",
    '{"stop": ' + 400 * "[" + 400 * "]" + "}": "sampling",
}


@pytest.mark.parametrize("as_text", [False, True])
def test_a_wrong_sampling_is_an_error_row(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "a.jsonl"
    values = [json.dumps(text) if as_text else text for text in WRONG_SAMPLINGS]
    path.write_text("".join(f'{{"prompt": "x", "sampling": {value}}}\n' for value in values))
    for row, reason in zip(prompts(path), WRONG_SAMPLINGS.values(), strict=True):
        assert row.error is not None
        assert reason in row.error
        assert len(row.error) <= 300


def test_what_requests_can_hold_that_columns_cannot(tmp_path: Path) -> None:
    deep = 900 * "[" + 900 * "]"
    lines = [
        '{"custom_id": "1", "body": {"prompt": "x", "stop": "\\ud800"}}',
        '{"custom_id": "2", "body": {"prompt": "x", "stop": ' + deep + "}}",
        '{"custom_id": "3", "body": {"messages": [{"role": ' + deep + "}]}}",
        '{"custom_id": "4", "body": {"messages": [{"role": "' + 9999 * "x" + '"}]}}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    for row in prompts(path, format=DataFormat.openai_batch):
        assert row.error is not None
        assert 0 < len(row.error.encode()) <= 300


def test_objects_and_maps_of_column_wise_files(tmp_path: Path) -> None:
    """Arrow knows no missing keys: an object has those of all rows, null where it has none. Maps come as pairs."""
    pairs = pa.map_(pa.string(), pa.float64())
    conversation = pa.list_(pa.map_(pa.string(), pa.string()))
    table = pa.table(
        {
            "messages": pa.array(2 * [[[("role", "user"), ("content", "hi")]]], conversation),
            "sampling": [{"logit_bias": {"5": 1.0, "7": None}}, {"logit_bias": {"5": None, "7": 2.0}}],
        }
    )
    pq.write_table(table, tmp_path / "objects.parquet")
    found = prompts(tmp_path / "objects.parquet")
    assert [row.error for row in found] == [None, None]
    assert [row.sampling.logit_bias for row in found] == [{5: 1.0}, {7: 2.0}]
    bias = pa.array([{"logit_bias": [(5, 1.0)]}], pa.struct([("logit_bias", pa.map_(pa.int64(), pa.float64()))]))
    for sampling in (bias, pa.array([[("max_tokens", 3.0)]], pairs)):
        pq.write_table(pa.table({"prompt": ["x"], "sampling": sampling}), tmp_path / "maps.parquet")
        (row,) = prompts(tmp_path / "maps.parquet")
        assert row.error is None
        assert row.sampling != SamplingConfig()


def test_min_tokens_without_a_token_that_goes_on_is_refused(tmp_path: Path) -> None:
    """All logits would be -inf: whatever were chosen, it would not be what was asked for."""
    everything = list(range(32000))
    cases = [
        ({"min_tokens": 1, "allowed_token_ids": [2]}, True),
        ({"min_tokens": 1, "allowed_token_ids": [2, 7], "stop_token_ids": [7]}, True),
        ({"min_tokens": 1, "allowed_token_ids": [2, 8], "stop_token_ids": [7]}, False),
        ({"allowed_token_ids": [2]}, False),
        ({"min_tokens": 1, "stop_token_ids": everything[:1000]}, False),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x", "sampling": sampling}) + "\n" for sampling, _ in cases))
    for row, (_, refused) in zip(prompts(path), cases, strict=True):
        assert (row.error is not None) == refused, row
        assert not refused or "sampling.min_tokens=1: every token that could be chosen ends the text" in str(row.error)


# Which column is the prompt

BOTH = {
    "prompt": "What is a llama?",
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    "prompt_token_ids": [1, 2, 3],
    "other": "Other",
}
"""Prompt and messages side by side, as in data sets for fine-tuning: the messages end with the answer."""


def test_a_named_column_wins(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(BOTH) + "\n" + json.dumps({**BOTH, "prompt_token_ids": None}) + "\n")

    def ids(**options: Any) -> list[list[int]]:
        return [list(row.token_ids) for row in prompts(path, **options)]

    text = load_tokenizer(TINY)
    assert text is not None
    (what,), (other,) = ([ids(template=name)[1]] for name in ("{{ prompt }}", "{{ other }}"))
    assert ids()[0] == [1, 2, 3]
    assert prompts(path)[1].error is not None, "messages come before the prompt, and these end with an answer"
    assert ids(prompt_column="prompt") == [what, what]
    assert ids(prompt_column="other") == [other, other]
    assert ids(template="{{ prompt }}") == [what, what]
    assert ids(template="{{ prompt }}", token_ids_column="prompt_token_ids") == [[1, 2, 3], what]
    assert ids(prompt_column="prompt", token_ids_column="prompt_token_ids") == [[1, 2, 3], what]
    (first, second) = prompts(path, token_ids_column="prompt_token_ids")
    assert first.error is None
    assert second.error == "no prompt: columns 'prompt_token_ids' are null or missing"


def test_columns_whose_names_are_no_identifiers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Review Text,review-title,2nd,keys\nNice and soft,Good,x,k\n")
    (wanted,) = prompts(path, template="Nice and soft Good x k")
    template = "{{ row['Review Text'] }} {{ row['review-title'] }} {{ row[\"2nd\"] }} {{ keys }}"
    for columns in (None, []):
        assert prompts(path, template=template, columns=columns)[0].token_ids == wanted.token_ids
    with pytest.raises(BatchmixError, match=r"no column 'Review' .data.template.; .* did you mean"):
        prompts(path, template="{{ row['Review'] }}")
    with pytest.raises(BatchmixError, match=r"no column 'review' .*; did you mean row\['review-title'\]\?"):
        prompts(path, template="{{ review-title }}")
    with pytest.raises(BatchmixError, match="no column 'row'"):
        prompts(path, template="{{ row }}")
    path.write_text("row,text\n7,x\n")
    (wanted,) = prompts(path, template="7 x")
    assert prompts(path, template="{{ row }} {{ text }}")[0].token_ids == wanted.token_ids
    swapped = RowTemplate("{{ row['a b'] }}{{ row.c }}{% for x in y %}{{ x }}{% endfor %}")
    assert swapped.variables == {"a b", "c", "y"}
    assert RowTemplate("{{ row.items() }}").variables == {"row"}


def test_sharegpt_conversations_are_messages(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello."), ("human", "And?")]
    usual = {"system": "system", "human": "user", "gpt": "assistant"}
    rows = [
        {"conversations": [{"from": role, "value": text} for role, text in turns]},
        {"conversations": [{"role": usual[role], "content": text} for role, text in turns]},
        {"conversations": [{"from": role, "value": text} for role, text in turns[:3]]},
        {"conversations": [{"from": "tool", "value": "3"}]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, same, ended, other = prompts(path, messages_column="conversations")
    assert one.error is None
    assert one.token_ids == same.token_ids
    assert "conversations[2] (gpt): nothing left to answer; leave this turn out" in str(ended.error)
    assert "conversations[0]: from 'tool' is not one of system, human, user, gpt, assistant" in str(other.error)


def test_a_field_of_a_column_is_a_prompt(tmp_path: Path) -> None:
    rows = [{"meta": {"text": "Hi", "rules": "Be brief."}}, {"meta": {"text": None, "rules": None}}, {"meta": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "rules": "Be brief."}) + "\n")
    named = prompts(tmp_path / "a.parquet", prompt_column="meta.text", system_prompt_column="meta.rules")
    assert named[0].token_ids == prompts(path, system_prompt_column="rules")[0].token_ids
    assert [bool(prompt.error) for prompt in named] == [False, True, True]
