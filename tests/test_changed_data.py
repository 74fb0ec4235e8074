"""Input that changes between two runs, or during one, is refused; a run whose output was damaged names the part."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from batchmix.config import Config
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.input.source import Source
from batchmix.output.config import Order, OutputConfig
from batchmix.pipeline import generate
from batchmix.records import InputRow
from batchmix.sampling import SamplingConfig

PAD = "p" * 30_000


def job(tmp_path: Path, limit: int | None = None, name: str = "in.jsonl", **output: Any) -> Config:
    return Config(
        data=DataConfig(path=str(tmp_path / name), limit=limit, columns=["prompt"]),
        sampling=SamplingConfig(max_tokens=2, temperature=0.0),
        engine=EngineConfig(device="cpu"),
        output=OutputConfig(dir=str(tmp_path / "out"), rows_per_shard=4, **output),
    )


def lines(mark: str = "") -> list[str]:
    return [json.dumps({"prompt": f"{mark}row {i}", "pad": PAD}) for i in range(20)]


def edit(path: Path, row: int) -> None:
    """The same number of bytes, and the same times."""
    stat = path.stat()
    found = path.read_text().splitlines()
    found[row] = found[row].replace('"row', '"Row')
    path.write_text("\n".join(found) + "\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_an_edit_amid_the_file_is_refused_and_a_copy_is_not(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines()) + "\n")
    generate(job(tmp_path, 8))
    good = path.read_bytes()
    edit(path, 5)
    for config in (job(tmp_path, 8), job(tmp_path), job(tmp_path, order=Order.input)):
        with pytest.raises(
            BatchmixError, match=r"with other settings \(data: .*in.jsonl has changed between its bytes "
        ):
            generate(config)
    assert len(ds.dataset(tmp_path / "out", format="arrow").to_table()) == 8
    path.unlink()
    copy = tmp_path / "moved" / "in.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(good)
    generate(job(tmp_path, name="moved/in.jsonl", order=Order.input))
    assert len(ds.dataset(tmp_path / "out", format="arrow").to_table()) == 20
    edit(copy, 10)  # what was merged still counts
    with pytest.raises(BatchmixError, match=r"in.jsonl has changed between its bytes "):
        generate(job(tmp_path, name="moved/in.jsonl", order=Order.input))
    generate(job(tmp_path, name="moved/in.jsonl", overwrite=True))
    shutil.rmtree(tmp_path / "out" / ".batchmix/checksums")  # as an earlier release leaves a folder
    generate(job(tmp_path, 19, name="moved/in.jsonl"))


@pytest.mark.parametrize("how", ["grows", "is edited"])
def test_input_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines()) + "\n")
    read = Source.rows

    def rows(self: Source, done: Any) -> Iterator[InputRow]:
        for row in read(self, done):
            if row.row == 18:
                if how == "grows":
                    with path.open("a") as file:
                        file.write('{"prompt": "one more"}\n')
                else:
                    edit(path, 7)
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(Source, "rows", rows)
        with pytest.raises(BatchmixError, match=r"in.jsonl has changed.* while it was read, .* output.overwrite=true"):
            generate(job(tmp_path))
    assert not (tmp_path / "out" / ".batchmix/SUCCESS").exists()
    with pytest.raises(BatchmixError, match=r"in\.jsonl has changed"):
        generate(job(tmp_path))


def test_a_damaged_part_stops_a_resume(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(lines()) + "\n")
    generate(job(tmp_path, 8))
    part = sorted((tmp_path / "out").glob("part-*"))[0]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 16
    part.write_bytes(data)
    with pytest.raises(BatchmixError, match=rf"{part}: cannot be read back .* delete it and run the command again"):
        generate(job(tmp_path))
    part.unlink()
    generate(job(tmp_path))
    assert sorted(ds.dataset(tmp_path / "out", format="arrow").to_table()["row"].to_pylist()) == list(range(20))
