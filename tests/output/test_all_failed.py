"""A run whose every row is an error is finished like any other, and then ends with one line and exit code 1."""

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
from batchmix.engine.config import EngineConfig
from batchmix.input.config import DataConfig, ShardConfig
from batchmix.output.all_failed import AllRowsFailed, check_not_all_failed
from batchmix.output.columns import OutputColumns
from batchmix.output.config import Order, OutputConfig, OutputFormat, Redo
from batchmix.output.part_formats import part_format
from batchmix.output.parts import Parts
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
        with pytest.raises(AllRowsFailed) as raised:
            generate(config)
        assert str(raised.value) == line(out, 3, "messages is empty")
    assert (out / "_SUCCESS").exists()
    assert json.loads((out / "_summary.json").read_text())["error_rows"] == 3
    assert "3 rows, 6 samples (error 6)" in capsys.readouterr().out
    write(data, [GOOD])
    config.output.overwrite = True
    generate(config)


def test_responses_of_the_batch_api(tmp_path: Path) -> None:
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", **EMPTY}}
    data, out = write(tmp_path / "requests.jsonl", [request]), tmp_path / "out"
    with pytest.raises(AllRowsFailed) as raised:
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
        with pytest.raises(AllRowsFailed, match="3 rows, none could be run"):
            generate(job(data, tmp_path / "out", shard=shard))
    for shard in (one, zero):  # row 0, the error, is the last
        generate(job(mixed, tmp_path / "mixed", shard=shard))


def test_rows_that_are_errors_again(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [EMPTY] * 2)
    with pytest.raises(AllRowsFailed):
        generate(job(data, tmp_path / "out"))
    again = job(data, tmp_path / "out", sampling={"max_tokens": 3}, output={"redo": Redo.error})
    for _ in range(2):  # the second has nothing to redo
        with pytest.raises(AllRowsFailed, match="2 rows, none could be run"):
            generate(again)


@pytest.mark.slow  # starts two processes that load the model
def test_workers_side_by_side(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [EMPTY] * 4)
    with pytest.raises(AllRowsFailed, match="4 rows, none could be run"):
        generate(job(data, tmp_path / "out", engine={"data_parallel_size": 2}))


@pytest.mark.slow  # seconds under the interpreter, or of processes
def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write(tmp_path / "rows.jsonl", [EMPTY] * 2), tmp_path / "out"
    command = ["generate", f"data.path={data}", f"output.dir={out}", "engine.device=cpu"]
    for arguments in (command, ["finalize", f"output.dir={out}"]):
        assert main(arguments) == 1
        said = capsys.readouterr()
        assert said.err.splitlines()[-1] == f"batchmix: error: {line(out, 2, 'messages is empty')}"
    assert "each of 2 rows is there once; _SUCCESS is written" in said.out
    write(data, [GOOD])
    assert main([*command, "output.overwrite=true", "sampling.max_tokens=2"]) == 0


def test_the_report_of_a_task_is_there_first(tmp_path: Path) -> None:
    data, out = write(tmp_path / "rows.jsonl", [{"text": None}, {"text": None}]), tmp_path / "out"
    config = job(data, out)
    config.annotate = AnnotateConfig(input="{{ text + '' }}", choice=["good", "bad"])
    for _ in range(2):
        with pytest.raises(AllRowsFailed, match=r"2 rows, none could be run; row 0: data\.template fails on this row"):
            annotate(config)
        (out / "_report/report.html").unlink()
    assert len(ds.dataset(out, format="arrow").to_table()) == 2


def test_the_first_row_may_be_in_any_part(tmp_path: Path) -> None:
    columns = OutputColumns(pa.schema([]), token_ids=False, logprobs=False)
    parts = Parts(LocalFolder(tmp_path), part_format(OutputFormat.arrow, columns, None, None))
    parts.storage.make_folder("_checksums")
    for number, rows in enumerate(([5, 4], [], [7, 3], [6])):
        failed = [Completion.failed(Prompt(i, str(i), {}, [], SamplingConfig(), f"e{i}"), f"e{i}") for i in rows]
        assert parts.create(parts.name(0, number), parts.format.records(failed))
    with pytest.raises(AllRowsFailed, match="5 rows, none could be run; row 3: e3 "):
        check_not_all_failed(parts)


def test_no_part_behind_the_first_answer_is_read(tmp_path: Path) -> None:
    columns = OutputColumns(pa.schema([]), token_ids=False, logprobs=False)
    parts = Parts(LocalFolder(tmp_path), part_format(OutputFormat.arrow, columns, None, None))
    parts.storage.make_folder("_checksums")
    prompt = Prompt(0, "0", {}, [1], SamplingConfig())
    parts.create(parts.name(0, 0), parts.format.records([Completion(prompt, 0, [2], "stop", text="x")]))
    (tmp_path / parts.name(0, 1)).write_bytes(b"damaged")
    check_not_all_failed(parts)
