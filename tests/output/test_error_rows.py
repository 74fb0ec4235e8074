"""A run with too many error rows is finished, and then ends with one line, exit code 1 and no `SUCCESS`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from slow_cases import slow_after

from batchmix.annotate.config import AnnotateConfig
from batchmix.annotation import annotate
from batchmix.cli import main
from batchmix.config import Config
from batchmix.config_checks import check
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig, ShardConfig
from batchmix.observability.error_reasons import ErrorReasons, reason_lines
from batchmix.observability.first_rows import FirstRows
from batchmix.output.columns import OutputColumns
from batchmix.output.config import Order, OutputConfig, OutputFormat, Redo
from batchmix.output.error_rows import TooManyErrors, explain_errors
from batchmix.output.part_formats import part_format
from batchmix.output.parts import Parts
from batchmix.output.stored_run import read_status
from batchmix.pipeline import generate
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig
from batchmix.storage import LocalFolder

EMPTY = {"messages": []}
GOOD = {"messages": [{"role": "user", "content": "Hello"}]}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(data: Path, out: Path, **groups: dict[str, Any]) -> Config:
    return Config(
        data=DataConfig(path=str(data)),
        sampling=SamplingConfig(**{"max_tokens": 2, "temperature": 0.0, **groups.get("sampling", {})}),
        engine=EngineConfig(device="cpu", **groups.get("engine", {})),
        output=OutputConfig(dir=str(out), **groups.get("output", {})),
        shard=ShardConfig(**groups.get("shard", {})),
    )


def line(out: Path, rows: int, error: str) -> str:
    return (f"output.dir={out}: {rows} row{'s' * (rows > 1)}, none could be run; row 0: {error} (mend that, and run with"
            " another output.dir or with output.overwrite=true)")  # fmt: skip


@pytest.mark.parametrize("form", slow_after(1, OutputFormat))
def test_the_run_is_finished_first(tmp_path: Path, form: OutputFormat, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write(tmp_path / "rows.jsonl", [EMPTY, {"messages": 5}, EMPTY]), tmp_path / "out"
    config = job(data, out, sampling={"n": 2}, output={"format": form, "order": Order.input, "rows_per_shard": 2})
    for _ in range(2):  # the second finds it complete
        with pytest.raises(TooManyErrors) as raised:
            generate(config)
        assert str(raised.value) == line(out, 3, "messages is empty")
        assert (out / ".batchmix/FAILED").exists()
        assert not (out / ".batchmix/SUCCESS").exists()
    summary = json.loads((out / ".batchmix/summary.json").read_text())
    assert summary["error_rows"] == 3
    assert summary["errors"] == [
        {"rows": 2, "example_row": 0, "example": "messages is empty"},
        {"rows": 1, "example_row": 1, "example": "messages must be a list of {role, content}, not int"},
    ]
    said = capsys.readouterr().out
    assert "3 rows, 6 samples (error 6)" in said
    assert "3 of 3 rows have an error; by reason, with an example:\n       2  row 0: messages is empty\n" in said
    write(data, [GOOD])
    config.output.overwrite = True
    generate(config)
    assert (out / ".batchmix/SUCCESS").exists()
    assert not (out / ".batchmix/FAILED").exists()


def test_responses_of_the_batch_api(tmp_path: Path) -> None:
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", **EMPTY}}
    data, out = write(tmp_path / "requests.jsonl", [request]), tmp_path / "out"
    with pytest.raises(TooManyErrors) as raised:
        generate(job(data, out, output={"format": OutputFormat.jsonl}))
    assert str(raised.value) == line(out, 1, "messages is empty")


def test_one_answer_or_no_rows_at_all_is_no_error(tmp_path: Path) -> None:
    generate(job(write(tmp_path / "rows.jsonl", [EMPTY, EMPTY, GOOD]), tmp_path / "out", output={"rows_per_shard": 1}))
    (tmp_path / "none.csv").write_text("prompt\n")
    for _ in range(2):
        generate(job(tmp_path / "none.csv", tmp_path / "none"))


def test_the_shard_that_ends_last_sees_the_whole(tmp_path: Path) -> None:
    data, mixed = write(tmp_path / "rows.jsonl", [EMPTY] * 3), write(tmp_path / "mixed.jsonl", [EMPTY, GOOD])
    zero, one = ({"index": index, "count": 2} for index in (0, 1))
    generate(job(data, tmp_path / "out", shard=zero))
    for shard in (one, zero):
        with pytest.raises(TooManyErrors, match="3 rows, none could be run"):
            generate(job(data, tmp_path / "out", shard=shard))
    for shard in (one, zero):  # row 0, the error, is the last
        generate(job(mixed, tmp_path / "mixed", shard=shard))


def test_rows_that_are_errors_again(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [EMPTY] * 2)
    with pytest.raises(TooManyErrors):
        generate(job(data, tmp_path / "out"))
    again = job(data, tmp_path / "out", sampling={"max_tokens": 3}, output={"redo": Redo.error})
    for _ in range(2):  # the second has nothing to redo
        with pytest.raises(TooManyErrors, match="2 rows, none could be run"):
            generate(again)


@pytest.mark.slow  # starts two processes that load the model
def test_workers_side_by_side(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [EMPTY] * 4)
    with pytest.raises(TooManyErrors, match="4 rows, none could be run"):
        generate(job(data, tmp_path / "out", engine={"data_parallel_size": 2}))


@pytest.mark.slow  # seconds under the interpreter, or of processes
def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write(tmp_path / "rows.jsonl", [EMPTY] * 2), tmp_path / "out"
    command = ["generate", f"data.path={data}", f"output.dir={out}", "engine.device=cpu"]
    for arguments in (command, ["finalize", f"output.dir={out}"]):
        assert main(arguments) == 1
        said = capsys.readouterr()
        assert said.err.splitlines()[-1] == f"batchmix: error: {line(out, 2, 'messages is empty')}"
    assert f"each of 2 rows is there once; {out}/.batchmix/SUCCESS is not written" in said.out
    with pytest.raises(SystemExit) as left:
        main(["status", f"output.dir={out}"])
    assert left.value.code == 4
    said = capsys.readouterr()
    assert "failed rows by reason, with an example:\n       2  row 0: messages is empty\n" in said.out
    assert "finished with too many errors:" in said.out
    write(data, [GOOD])
    assert main([*command, "output.overwrite=true", "sampling.max_tokens=2"]) == 0


def test_the_report_of_a_task_is_there_first(tmp_path: Path) -> None:
    data, out = write(tmp_path / "rows.jsonl", [{"text": None}, {"text": None}]), tmp_path / "out"
    config = job(data, out)
    config.annotate = AnnotateConfig(input="{{ text + '' }}", choice=["good", "bad"])
    for _ in range(2):
        with pytest.raises(TooManyErrors, match=r"2 rows, none could be run; row 0: data\.template fails on this row"):
            annotate(config)
        (out / ".batchmix/report/report.html").unlink()
    assert len(ds.dataset(out, format="arrow").to_table()) == 2


def test_the_first_row_of_the_most_common_reason_is_shown(tmp_path: Path) -> None:
    columns = OutputColumns(pa.schema([]), token_ids=False, logprobs=False)
    parts = Parts(LocalFolder(tmp_path), part_format(OutputFormat.arrow, columns, None, None))
    parts.storage.make_folder(".batchmix/checksums")
    for number, rows in enumerate(([5, 4], [], [7, 3], [6])):
        failed = [Completion.failed(Prompt(i, str(i), {}, [], SamplingConfig(), f"e{i}"), f"e{i}") for i in rows]
        assert parts.create(parts.name(0, number), parts.format.records(failed))
    text = explain_errors("out", parts.totals(), parts.error_reasons(), 1.0)
    assert text.startswith("output.dir=out: 5 rows, none could be run; row 3: e3 (")


def test_only_parts_with_errors_are_read_for_their_reasons(tmp_path: Path) -> None:
    columns = OutputColumns(pa.schema([]), token_ids=False, logprobs=False)
    parts = Parts(LocalFolder(tmp_path), part_format(OutputFormat.arrow, columns, None, None))
    parts.storage.make_folder(".batchmix/checksums")
    good, bad = Prompt(0, "0", {}, [1], SamplingConfig()), Prompt(1, "1", {}, [], SamplingConfig(), "no")
    parts.create(parts.name(0, 0), parts.format.records([Completion(good, 0, [2], "stop", text="x")]))
    parts.create(parts.name(0, 1), parts.format.records([Completion.failed(bad, "no")]))
    read: list[str] = []
    batches = parts.batches
    parts.batches = lambda name, columns=None: read.append(name) or batches(name, columns)  # type: ignore[method-assign,func-returns-value]
    assert [(one.rows, one.example_row) for one in parts.error_reasons().most_common()] == [(1, 1)]
    assert read == [parts.name(0, 1)]


def test_the_share_is_of_the_whole_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write(tmp_path / "rows.jsonl", [EMPTY, GOOD, GOOD, GOOD]), tmp_path / "out"
    zero, one = ({"index": index, "count": 2} for index in (0, 1))

    def run(share: float, shard: dict[str, int]) -> None:
        config = job(data, out, shard=shard)
        config.data.max_error_share = share
        generate(config)

    run(0.25, zero)  # half of this shard's rows
    assert not (out / ".batchmix/FAILED").exists()
    run(0.25, one)
    assert (out / ".batchmix/SUCCESS").exists()
    for shard in (zero, one, zero):  # a rerun that allows less
        with pytest.raises(TooManyErrors) as raised:
            run(0.2, shard)
        assert str(raised.value) == (
            f"output.dir={out}: 1 of 4 rows have an error, more than data.max_error_share=0.2 allows; the most common reason"
            " (1 row): row 0: messages is empty (mend that and run with another output.dir, or raise"
            " data.max_error_share of the command that generates)"
        )
        assert (out / ".batchmix/FAILED").exists()
        assert not (out / ".batchmix/SUCCESS").exists()
    run(1.0, one)  # and one that allows more again
    assert (out / ".batchmix/SUCCESS").exists()
    assert not (out / ".batchmix/FAILED").exists()
    assert len(ds.dataset(out, format="arrow").to_table()) == 4
    capsys.readouterr()


def test_a_damaged_failed_file_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = job(write(tmp_path / "rows.jsonl", [EMPTY]), out)
    with pytest.raises(TooManyErrors):
        generate(config)
    (out / ".batchmix/FAILED").write_text("{")
    failure = read_status(config).failure
    assert failure is not None
    assert failure.startswith(f"{out}/.batchmix/FAILED: cannot be read (")
    with pytest.raises(TooManyErrors, match="none could be run"):  # a rerun writes it anew
        generate(config)


def test_a_share_is_from_0_to_1() -> None:
    config = Config()
    config.data.max_error_share = 1.5
    with pytest.raises(BatchmixError, match=r"data\.max_error_share=1\.5: must be from 0 to 1"):
        check(config)


def test_a_folder_of_a_release_that_took_any_number_of_errors(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = job(write(tmp_path / "rows.jsonl", [EMPTY, GOOD]), out)
    generate(config)
    old = json.loads((out / ".batchmix/SUCCESS").read_text())
    del old["rows"], old["error_rows"]
    (out / ".batchmix/SUCCESS").write_text(json.dumps(old))
    generate(config)
    config.data.max_error_share = 0.4
    with pytest.raises(TooManyErrors, match="1 of 2 rows have an error"):
        generate(config)


def test_a_first_batch_that_fails_warns_before_the_model_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TooManyErrors):
        generate(job(write(tmp_path / "rows.jsonl", [EMPTY] * 3), tmp_path / "out"))
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "none of the first 3 rows could be run; row 0: messages is empty" in messages
    caplog.clear()
    generate(job(write(tmp_path / "mixed.jsonl", [EMPTY, GOOD]), tmp_path / "mixed"))
    assert "none of the first" not in caplog.text


def test_first_answers_that_all_fail_warn_at_once(caplog: pytest.LogCaptureFixture) -> None:
    def prompt(row: int) -> Prompt:
        return Prompt(row, str(row), {}, [1], SamplingConfig())

    first, other = FirstRows(), FirstRows()
    other.count(Completion(prompt(0), 0, [2], "stop"))
    for row in range(300):
        first.count(Completion.failed(prompt(row), f"cut after {row}"))
        other.count(Completion.failed(prompt(row), "cut"))
    assert [record.getMessage() for record in caplog.records] == [
        "none of the first 256 rows could be run; row 255: cut after 255"
    ]


def test_reasons_differ_in_words_not_in_values() -> None:
    reasons = ErrorReasons()
    for row, error in enumerate(["role 'a' is not one", "role 'bc' is not one", "prompt has 1,500 tokens", "x", "x"]):
        reasons.add(row, error)
    assert reason_lines(reasons.most_common(), 2) == [
        "       2  row 0: role 'a' is not one", "       2  row 3: x", "       1  for other reasons",
    ]  # fmt: skip
