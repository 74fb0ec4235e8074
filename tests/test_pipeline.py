"""Whole runs in this process: the promises that need no kill."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from batchmix.config import Config
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError, Interrupted
from batchmix.input.config import DataConfig, OnError, ShardConfig
from batchmix.output.config import Order, OutputConfig, OutputFormat, Redo
from batchmix.output.lease import Lease, shard_name
from batchmix.pipeline import generate
from batchmix.plan import plan_report
from batchmix.sampling import SamplingConfig
from batchmix.storage import LocalFolder

TICKETS = Path(__file__).parent.parent / "examples" / "support_tickets.jsonl"
GREEDY = {"temperature": 0.0, "max_tokens": 24}
SAMPLED = {"temperature": 1.0, "max_tokens": 24, "seed": 5}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in TICKETS.read_text(encoding="utf-8").splitlines()[:40]]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def job(path: Path | str, folder: Path, **groups: dict[str, Any]) -> Config:
    return Config(
        data=DataConfig(path=str(path), **{"id_column": "id", **groups.get("data", {})}),
        sampling=SamplingConfig(**groups.get("sampling", GREEDY)),
        engine=EngineConfig(device="cpu", **groups.get("engine", {})),
        output=OutputConfig(dir=str(folder), **groups.get("output", {})),
        shard=ShardConfig(**groups.get("shard", {})),
    )


def read(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ds.dataset(folder, format="arrow").to_table().to_pylist()
    return sorted(found, key=lambda row: (row["row"], row["sample_index"]))


def answers(folder: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    found = read(folder)
    by_id = {(r["id"], r["sample_index"]): (r["generated_text"], r["finish_reason"], r["error"]) for r in found}
    assert len(by_id) == len(found)
    return by_id


def part_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


@pytest.mark.parametrize(
    ("sampling", "count"),
    [
        pytest.param(GREEDY, 40, marks=pytest.mark.slow, id="greedy"),
        pytest.param(SAMPLED, 40, marks=pytest.mark.slow, id="sampled"),
        pytest.param(SAMPLED | {"max_tokens": 12}, 18, id="a few, sampled", marks=pytest.mark.slow),
    ],
)
def test_answers_do_not_depend_on_how_the_job_is_run(tmp_path, rows, sampling, count):
    rows = rows[:count]
    data = write(tmp_path / "rows.jsonl", rows)
    generate(job(data, tmp_path / "plain", sampling=sampling))
    expected = answers(tmp_path / "plain")
    assert len(expected) == len(rows)
    for seqs in (1, 7, 64):
        generate(job(data, tmp_path / f"seqs{seqs}", sampling=sampling, engine={"max_num_seqs": seqs}))
        assert answers(tmp_path / f"seqs{seqs}") == expected
    shuffled = write(tmp_path / "shuffled.jsonl", random.Random(1).sample(rows, len(rows)))
    generate(job(shuffled, tmp_path / "shuffled", sampling=sampling))
    assert answers(tmp_path / "shuffled") == expected
    for index in (2, 0, 1):
        assert not (tmp_path / "shards" / ".batchmix/SUCCESS").exists()
        generate(job(data, tmp_path / "shards", sampling=sampling, shard={"index": index, "count": 3}))
    assert answers(tmp_path / "shards") == expected
    assert (tmp_path / "shards" / ".batchmix/SUCCESS").exists()
    assert json.loads((tmp_path / "shards" / ".batchmix/summary.json").read_text())["rows"] == len(rows)
    generate(job(data, tmp_path / "resumed", sampling=sampling, data={"limit": 15}, output={"rows_per_shard": 4}))
    part_files(tmp_path / "resumed")[1].unlink()
    generate(job(data, tmp_path / "resumed", sampling=sampling))
    assert answers(tmp_path / "resumed") == expected


@pytest.mark.slow  # seconds under the interpreter, or of processes
def test_a_trace_shows_every_stage_in_its_thread(tmp_path, rows):
    data = write(tmp_path / "rows.jsonl", rows)
    generate(job(data, tmp_path / "out", engine={"trace": True}))
    events = json.loads((tmp_path / "out" / ".batchmix/trace.json").read_text())
    threads = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    assert {(threads[span["tid"]], span["name"]) for span in spans} == {
        ("read and tokenise", "read"), ("read and tokenise", "tokenise"), ("engine", "prefill"), ("engine", "decode"),
        ("write", "write"),
    }  # fmt: skip
    summary = json.loads((tmp_path / "out" / ".batchmix/summary.json").read_text())
    for stage, seconds in summary["seconds"].items():
        assert sum(span["dur"] for span in spans if span["name"] == stage) / 1e6 == pytest.approx(seconds, abs=2e-3)
    assert 0.5 < summary["device_busy"] <= 1
    generate(job(data, tmp_path / "out", engine={"trace": False}, output={"overwrite": True}))
    assert not (tmp_path / "out" / ".batchmix/trace.json").exists()


def test_the_output_contract(tmp_path, rows):
    rows = [{**row, "n": i, "row": f"r{i}", "tags": ["a", "b"][: i % 3]} for i, row in enumerate(rows[:12])]
    data = write(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    generate(job(data, out, sampling={**SAMPLED, "n": 2, "logprobs": 1}, output={"token_ids": True}))
    table = ds.dataset(out, format="arrow").to_table()
    assert table.schema.names == [
        "row", "id", "sample_index", "messages", "gold", "n", "input_row", "tags", "generated_text",
        "finish_reason", "stop_reason", "prompt_tokens", "completion_tokens", "cumulative_logprob", "error",
        "generated_token_ids", "logprobs",
    ]  # fmt: skip
    assert table.schema.field("row").type == pa.int64()
    assert table.schema.field("n").type == pa.int64()
    assert table.schema.field("tags").type == pa.list_(pa.string())
    assert b"batchmix.model_sha256" in table.schema.metadata
    for found in read(out):
        given = rows[found["row"]]
        assert (found["id"], found["input_row"]) == (given["id"], given["row"])
        assert (found["messages"], found["n"], found["tags"]) == (given["messages"], given["n"], given["tags"])
        assert len(found["logprobs"]) == found["completion_tokens"]
        assert found["cumulative_logprob"] == pytest.approx(
            sum(entry["logprob"] for entry in found["logprobs"]), abs=1e-4
        )
    assert len(table) == 24
    files = [str(path) for path in part_files(out)]
    loaded = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 24
    summary = json.loads((out / ".batchmix/summary.json").read_text())
    assert (summary["rows"], summary["samples"], summary["error_rows"]) == (12, 24, 0)
    assert summary["completion_tokens"] == sum(row["completion_tokens"] for row in read(out))
    assert summary["prompt_tokens"] == sum(row["prompt_tokens"] for row in read(out)) / 2
    assert {"seconds", "generate_seconds", "output_tokens_per_second"} <= summary.keys()
    lines = [json.loads(line) for line in (out / ".batchmix/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["rows"] == 12


def test_rows_that_cannot_run_are_error_rows(tmp_path, rows):
    bad = [
        "{broken",
        "[1, 2]",
        {"id": "empty", "messages": []},
        {"id": "role", "messages": [{"role": "king", "content": "x"}]},
        {"id": "long", "messages": [{"role": "user", "content": "word " * 5000}]},
        {"id": "number", "messages": 5},
        {"id": "none"},
        {"id": "sampling", "messages": rows[0]["messages"], "sampling": {"temprature": 1}},
    ]
    mixed = [line for pair in zip(rows, bad, strict=False) for line in pair] + rows[8:12]
    data = write(tmp_path / "rows.jsonl", mixed)
    generate(job(data, tmp_path / "out"))
    found = read(tmp_path / "out")
    assert [row["row"] for row in found] == list(range(len(mixed)))
    errors = {row["row"]: row["error"] for row in found if row["finish_reason"] == "error"}
    assert sorted(errors) == list(range(1, 16, 2))
    assert all(error and "\n" not in error for error in errors.values())
    assert "5004 tokens" in errors[9] or "tokens; at most 4095" in errors[9]
    assert all(row["generated_text"] for row in found if row["error"] is None)
    config = job(data, tmp_path / "strict", data={"on_error": OnError["raise"]})
    with pytest.raises(BatchmixError, match="row 1: "):
        generate(config)


@pytest.mark.slow  # 5 s and more
def test_order_input(tmp_path, rows):
    rows = rows[:15]
    data = write(tmp_path / "rows.jsonl", rows)
    sampling = {**SAMPLED, "n": 2}
    for form in OutputFormat:
        options = {"format": form, "rows_per_shard": 7, "order": Order.input}
        out = tmp_path / form.value
        generate(job(data, out, sampling=sampling, engine={"max_num_seqs": 5}, output=options))
        assert len(part_files(out)) == 5
        if form is OutputFormat.jsonl:
            found = [json.loads(line) for path in part_files(out) for line in path.read_text().splitlines()]
        else:
            files = [str(path) for path in part_files(out)]
            found = ds.dataset(files, format=form.value).to_table().to_pylist()
        assert [(row["row"], row["sample_index"]) for row in found] == [
            (i, s) for i in range(len(rows)) for s in (0, 1)
        ]
        assert [row["id"] for row in found[::2]] == [row["id"] for row in rows]
        assert not (out / ".batchmix/merge").exists()
        generate(job(data, out, sampling=sampling, output=options))  # nothing to do, nothing refused


def test_another_configuration_is_refused_by_its_keys(tmp_path, rows):
    data = write(tmp_path / "rows.jsonl", rows[:6])
    out = tmp_path / "out"
    generate(job(data, out))
    before = answers(out)
    with pytest.raises(BatchmixError, match=r"sampling\.max_tokens was 24, is now 5; sampling\.seed was 0, is now 1"):
        generate(job(data, out, sampling={"temperature": 0.0, "max_tokens": 5, "seed": 1}))
    write(data, rows[:5])
    with pytest.raises(BatchmixError, match=r"rows\.jsonl has changed"):
        generate(job(data, out))
    assert answers(out) == before
    generate(job(data, out, output={"overwrite": True}))
    assert len(answers(out)) == 5


def test_names_that_are_not_unicode(tmp_path, rows):
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    write(data, rows[:1])
    for _ in range(2):
        generate(job(data, tmp_path / "out"))
    with pytest.raises(BatchmixError, match=r"\(sampling\.max_tokens was 24, is now 1\)"):
        generate(job(data, tmp_path / "out", sampling={"max_tokens": 1, "temperature": 0.0}))


def test_settings_that_no_row_could_run_with_leave_nothing_behind(tmp_path, rows):
    data = write(tmp_path / "rows.jsonl", rows[:1])
    for wrong in (
        {"sampling": {"allowed_token_ids": [32000]}},
        {"data": {"system_prompt": "\udcff"}},
        {"data": {"template": "\udcff"}},
        {"data": {"template": ""}},
    ):
        with pytest.raises(BatchmixError, match=r"^[^\n\ud800-\udfff]*$"):
            generate(job(data, tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


def test_plan_writes_a_picture_or_says_why_not(tmp_path, rows, capsys):
    data, picture = write(tmp_path / "rows.jsonl", rows[:3]), tmp_path / "new" / "lengths.html"
    config = job(data, tmp_path)
    config.plan.histogram = str(picture)
    plan_report(config)
    printed = capsys.readouterr().out
    assert "3 rows" in printed
    assert f"histogram: {picture}" in printed
    assert "<title>3 prompts, " in picture.read_text()
    assert not (tmp_path / ".batchmix/lengths.svg").exists()
    config.plan.histogram = None
    plan_report(config)
    assert (tmp_path / ".batchmix/lengths.svg").read_text().startswith("<svg ")
    for nowhere in ("/proc/x.svg", str(data / "x.svg"), f"{tmp_path}/new/lengths.html/x.svg"):
        config.plan.histogram = nowhere
        with pytest.raises(BatchmixError, match=f"plan.histogram={nowhere}: cannot be written"):
            plan_report(config)


def test_a_run_that_left_no_rows_binds_nobody(tmp_path, rows, monkeypatch):
    data, out = write(tmp_path / "rows.jsonl", rows[:2]), tmp_path / "out"

    def interrupt(*_: object) -> None:
        raise Interrupted("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr("batchmix.distributed.executor.start_engine", interrupt)
        with pytest.raises(Interrupted):
            generate(job(data, out))
    other = {"sampling": {"temperature": 0.0, "max_tokens": 2}}
    half = {"shard": {"index": 0, "count": 2}}
    another = Lease(LocalFolder(out), shard_name(1, 2), ShardConfig(1, 2), "shard 1 of 2")  # which is loading its model
    with pytest.raises(BatchmixError, match=r"sampling\.max_tokens was 24, is now 2"):
        generate(job(data, out, **other, **half))
    with pytest.raises(BatchmixError, match=r"another process .* is writing shard 1 of 2 there"):
        generate(job(data, out, **other))
    another.close()
    generate(job(data, out, **other))
    assert [row["completion_tokens"] for row in read(out)] == [2, 2]


def test_what_is_not_ours_is_left_alone(tmp_path, rows):
    data = write(tmp_path / "rows.jsonl", rows[:3])
    out = tmp_path / "out"
    out.mkdir()
    (out / "part-0.parquet").write_text("somebody's")
    for overwrite in (False, True):
        with pytest.raises(BatchmixError, match="not ours to write to"):
            generate(job(data, out, output={"overwrite": overwrite}))
    assert (out / "part-0.parquet").read_text() == "somebody's"
    with pytest.raises(BatchmixError, match="would be read as data"):
        generate(job(tmp_path, tmp_path / "below"))


def test_redo_replaces_the_cut_rows(tmp_path, rows, caplog):
    caplog.set_level("INFO")
    rows = rows[:12]
    data = write(tmp_path / "rows.jsonl", rows)
    out, longer = tmp_path / "out", {"temperature": 0.0, "max_tokens": 40}
    short = {"temperature": 0.0, "max_tokens": 20}
    generate(job(data, out, sampling=short, output={"rows_per_shard": 9}))
    before = answers(out)
    cut = {key for key, answer in before.items() if answer[1] == "length"}
    assert 0 < len(cut) < len(rows)
    with pytest.raises(BatchmixError, match=r"only sampling\.\* may differ"):
        generate(job(data, out, sampling=longer, data={"system_prompt": "x"}, output={"redo": Redo.length}))
    generate(job(data, out, sampling=longer, output={"redo": Redo.length, "rows_per_shard": 3}))
    generate(job(data, tmp_path / "fresh", sampling=longer))
    fresh = answers(tmp_path / "fresh")
    assert answers(out) == {key: fresh[key] if key in cut else before[key] for key in before}
    assert not (out / ".batchmix/redo").exists()
    generate(job(data, out, sampling=longer, output={"redo": Redo.length}))  # done before: nothing to do
    for _ in range(2):
        caplog.clear()
        generate(job(data, out, sampling=longer, output={"redo": Redo.error}))
        assert "no row ended with error that was not redone with these settings before" in caplog.text
    generate(job(data, out, sampling=short))  # so is the first command
    assert len(answers(out)) == len(rows)


def test_redo_within_a_limit_leaves_the_other_rows(tmp_path, rows):
    data = write(tmp_path / "rows.jsonl", rows[:8])
    out, longer = tmp_path / "out", {"temperature": 0.0, "max_tokens": 6}
    generate(job(data, out, sampling={"temperature": 0.0, "max_tokens": 3}))
    for limit in (3, None):
        generate(job(data, out, sampling=longer, data={"limit": limit}, output={"redo": Redo.length}))
        assert [row["completion_tokens"] for row in read(out)] == [6] * (limit or 8) + [3] * (8 - (limit or 8))


def test_a_damaged_part_is_named_and_can_be_deleted(tmp_path, rows):
    data = write(tmp_path / "rows.jsonl", rows[:12])
    out, short = tmp_path / "out", {"sampling": {"temperature": 0.0, "max_tokens": 3}}
    generate(job(data, out, output={"rows_per_shard": 4}, engine={"max_num_seqs": 4}, **short))
    before, part = answers(out), part_files(out)[1]
    part.write_bytes(part.read_bytes()[:100])
    (out / ".batchmix/SUCCESS").unlink()
    with pytest.raises(BatchmixError, match=f"{part.name}: cannot be read back"):
        generate(job(data, out, **short))
    part.unlink()
    generate(job(data, out, **short))
    assert answers(out) == before


def test_a_part_deleted_after_all_shards_were_done(tmp_path, rows):
    data, out = write(tmp_path / "rows.jsonl", rows[:8]), tmp_path / "out"
    options = {"sampling": {"temperature": 0.0, "max_tokens": 2}, "output": {"rows_per_shard": 2}}
    for index in (0, 1):
        generate(job(data, out, shard={"index": index, "count": 2}, **options))
    next(out.glob("part-00001-*")).unlink()
    generate(job(data, out, shard={"index": 0, "count": 2}, **options))
    assert not (out / ".batchmix/SUCCESS").exists()
    generate(job(data, out, shard={"index": 1, "count": 2}, **options))
    assert (out / ".batchmix/SUCCESS").exists()
    assert len(answers(out)) == 8


def test_openai_batch_in_and_out(tmp_path, rows):
    requests = [
        {
            "custom_id": f"request-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": row["messages"], "temperature": 0, "max_tokens": 5 + i, "n": 1 + i % 2},
        }
        for i, row in enumerate(rows[:10])
    ]
    requests[3]["body"]["messages"] = []
    data = write(tmp_path / "requests.jsonl", requests)
    out = tmp_path / "out"
    config = job(data, out, data={"id_column": None}, output={"format": OutputFormat.jsonl, "order": Order.input})
    generate(config)
    lines = [json.loads(line) for path in part_files(out) for line in path.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [request["custom_id"] for request in requests]
    for i, line in enumerate(lines):
        if i == 3:
            assert (line["response"], line["error"]["message"]) == (None, "messages is empty")
            continue
        body = line["response"]["body"]
        assert [choice["index"] for choice in body["choices"]] == list(range(1 + i % 2))
        assert body["usage"]["completion_tokens"] == (5 + i) * (1 + i % 2)
        assert body["choices"][0]["message"]["content"]
    generate(config)


def test_template_and_system_prompt(tmp_path, rows):
    table = [{"id": row["id"], "text": row["messages"][0]["content"]} for row in rows[:5]]
    data = write(tmp_path / "rows.jsonl", table)
    generate(job(write(tmp_path / "messages.jsonl", rows[:5]), tmp_path / "messages"))
    generate(job(data, tmp_path / "template", data={"template": "{{ text }}"}))
    assert answers(tmp_path / "template") == answers(tmp_path / "messages")
    generate(job(data, tmp_path / "system", data={"template": "{{ text }}", "system_prompt": "Be kind."}))
    longer = [row["prompt_tokens"] for row in read(tmp_path / "system")]
    assert all(a > b["prompt_tokens"] for a, b in zip(longer, read(tmp_path / "template"), strict=True))


def test_stop_strings_and_min_tokens(tmp_path, rows):
    data = write(tmp_path / "rows.jsonl", rows[:6])
    stop = {**GREEDY, "stop": ['", "']}
    generate(job(data, tmp_path / "stop", sampling=stop))
    for row in read(tmp_path / "stop"):
        assert (row["finish_reason"], row["stop_reason"]) == ("stop", '", "')
        assert row["generated_text"].startswith('{"sentiment": "')
        assert '", "' not in row["generated_text"]
    generate(job(data, tmp_path / "kept", sampling={**stop, "include_stop_str_in_output": True}))
    assert all(row["generated_text"].endswith('", "') for row in read(tmp_path / "kept"))
    generate(job(data, tmp_path / "min", sampling={**stop, "min_tokens": 12, "max_tokens": 24}))
    assert all(row["completion_tokens"] > 12 for row in read(tmp_path / "min"))
