"""Conversations come out as lists of structs, whatever they came in as, and nothing of them is lost."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batchmix
from batchmix.annotate.prompts import RowPrompts
from batchmix.annotate.results import Results
from batchmix.config import Config
from batchmix.engine.config import EngineConfig
from batchmix.input.config import DataConfig
from batchmix.output.config import OutputConfig, OutputFormat
from batchmix.output.messages import MESSAGES, is_list_of_structs, message_records
from batchmix.pipeline import generate
from batchmix.sampling import SamplingConfig

SAID = [[("system", "Be kind."), ("user", f"Hello {i}")] for i in range(3)]
CHATS: list[list[dict[str, Any]]] = [[{"role": role, "content": text} for role, text in chat] for chat in SAID]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def csv_text(folder: Path) -> Path:
    with (folder / "chats.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(chat)] for chat in CHATS)])
    return folder / "chats.csv"


def extra_keys(folder: Path) -> Path:
    """That are null throughout, and of several types."""
    chats = [[{**one, "tool_calls": None, "weight": i or "none"} for one in chat] for i, chat in enumerate(CHATS)]
    return jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in chats])


def parts_and_texts(folder: Path) -> Path:
    chats = [*CHATS[:2], [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in CHATS[2]]]
    return jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in chats])


def sharegpt_text(folder: Path) -> Path:
    chats = [[{"from": one["role"], "value": one["content"]} for one in chat] for chat in CHATS]
    return jsonl(folder / "chats.jsonl", [{"messages": json.dumps(chat)} for chat in chats])


def openai_bodies(folder: Path) -> Path:
    return jsonl(folder / "chats.jsonl", [
        {"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": chat}}
        for i, chat in enumerate(CHATS)
    ])  # fmt: skip


def maps(folder: Path) -> Path:
    chats = [[list(one.items()) for one in chat] for chat in CHATS]
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"messages": pa.array(chats, kind)}), folder / "chats.parquet")
    return folder / "chats.parquet"


def structs(folder: Path) -> Path:
    return jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in CHATS])


def run(data: Path, out: Path, form: OutputFormat = OutputFormat.arrow, **settings: Any) -> None:
    generate(Config(
        data=DataConfig(path=str(data), **settings),
        sampling=SamplingConfig(max_tokens=2, temperature=0.0),
        engine=EngineConfig(device="cpu"),
        output=OutputConfig(dir=str(out), format=form, rows_per_shard=2),
    ))  # fmt: skip


def read(out: Path) -> pa.Table:
    return ds.dataset(out, format="arrow").to_table().sort_by("row")


@pytest.mark.parametrize(
    "write",
    [csv_text, extra_keys, parts_and_texts, sharegpt_text, openai_bodies, maps, structs],
    ids=lambda one: one.__name__,
)
def test_messages_come_out_as_a_list_of_structs(tmp_path: Path, write: Any) -> None:
    run(write(tmp_path), tmp_path / "out")
    table = read(tmp_path / "out")
    assert is_list_of_structs(table.schema.field("messages").type)
    assert table["error"].null_count == 3
    chats = table["messages"].to_pylist()
    assert [[(one["role"], one["content"]) for one in chat] for chat in chats] == SAID
    if write is extra_keys:
        assert [chat[0]["extra"] for chat in chats] == ['{"weight": "none"}', '{"weight": 1}', '{"weight": 2}']
    plain = tmp_path / "plain"
    plain.mkdir()
    run(structs(plain), plain / "out")
    answers = table["generated_text"].to_pylist()
    assert answers == read(plain / "out")["generated_text"].to_pylist()
    run(tmp_path / "out", tmp_path / "again")  # the output is an input
    assert read(tmp_path / "again")["generated_text"].to_pylist() == answers


def test_rows_that_are_no_conversation_keep_what_they_hold(tmp_path: Path) -> None:
    given = [CHATS[0], 5, "not JSON", '[{"role": "user", "content": "\\ud800"}]', None]
    run(jsonl(tmp_path / "chats.jsonl", [{"messages": value} for value in given]), tmp_path / "out")
    table = read(tmp_path / "out")
    assert table.schema.field("messages").type.equals(MESSAGES)
    assert [error is None for error in table["error"].to_pylist()] == [True, False, False, False, False]
    found = [
        None if chat is None else [(one["role"], one["content"]) for one in chat]
        for chat in table["messages"].to_pylist()
    ]
    assert found == [SAID[0], [(None, "5")], [(None, "not JSON")], [(None, given[3])], None]


@pytest.mark.parametrize("form", [OutputFormat.jsonl, OutputFormat.parquet])
def test_other_formats_and_the_report_have_them_too(tmp_path: Path, form: OutputFormat) -> None:
    run(csv_text(tmp_path), tmp_path / "out", form)
    table = batchmix.Run(str(tmp_path / "out")).table()
    assert table.schema.field("messages").type.equals(MESSAGES)
    assert [[(one["role"], one["content"]) for one in chat] for chat in table["messages"].to_pylist()] == SAID
    results = Results(str(tmp_path / "out"))
    shown = [RowPrompts(results).of(row) for row in results.rows()]
    assert shown == [f"system: Be kind.\n\nuser: Hello {i}" for i in range(3)]


def test_a_column_that_a_template_reads_stays_as_it_is(tmp_path: Path) -> None:
    run(jsonl(tmp_path / "a.jsonl", [{"messages": "a text"}]), tmp_path / "out", template="Read {{ messages }}")
    assert read(tmp_path / "out")["messages"].to_pylist() == ["a text"]


def test_a_run_of_an_earlier_release_keeps_the_column_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = csv_text(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("batchmix.preflight.columns_of", lambda storage: 1)
        run(data, tmp_path / "out")
    whole = read(tmp_path / "out")
    assert whole["messages"].to_pylist() == [json.dumps(chat) for chat in CHATS]
    for path in [sorted((tmp_path / "out").glob("part-*"))[-1], tmp_path / "out/.batchmix/SUCCESS"]:
        path.unlink()
    run(data, tmp_path / "out")
    assert read(tmp_path / "out").equals(whole)


text = st.text(st.characters(codec="utf-8"), max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(["role", "content", "name", "prefix", "extra", "from", "value", "weight"])
messages = st.lists(st.dictionaries(keys, values, max_size=4) | values, max_size=3)


@settings(deadline=None)
@given(values | messages | messages.map(json.dumps))
def test_any_value_fits_the_column_and_what_comes_out_can_come_in(value: Any) -> None:
    found = message_records(value)
    assert pa.array([found], MESSAGES).to_pylist() == [found]
    assert message_records(found) == found
