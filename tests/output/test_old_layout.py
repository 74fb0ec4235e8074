"""Folders that a release without `.batchmix/` began: they stay in their layout, and every command reads and finishes them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from old_layout import to_old_layout

import batchmix
from batchmix.annotate.config import ExportConfig
from batchmix.annotate.export import export
from batchmix.annotate.page import report
from batchmix.config import Config
from batchmix.engine.config import EngineConfig
from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.output.config import Order, OutputConfig, Redo
from batchmix.output.status import COMPLETE
from batchmix.output.stored_run import finalize_folder, read_status
from batchmix.pipeline import generate
from batchmix.sampling import SamplingConfig
from batchmix.storage.bookkeeping import RUN
from batchmix.storage.layout import OldLayout, open_output
from batchmix.storage.object_store import ObjectStore

ROWS = 6


def job(folder: Path, max_tokens: int = 3, **output: Any) -> Config:
    return Config(
        data=DataConfig(path=str(folder / "rows.jsonl")),
        sampling=SamplingConfig(max_tokens=max_tokens, temperature=1.0, seed=3),
        engine=EngineConfig(device="cpu"),
        output=OutputConfig(dir=str(folder / "out"), rows_per_shard=2, **output),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in the layout of today."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Ticket {i}"}) + "\n" for i in range(ROWS)))
    generate(job(folder))
    return folder


def old_run(made: Path, folder: Path) -> Path:
    """The output folder of the same run by an earlier release."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    to_old_layout(folder / "out")
    assert {"_SUCCESS", "_checksums", "_run.json", "_summary.json", "_workers"} < {
        path.name for path in (folder / "out").iterdir()
    }
    return folder / "out"


def read(out: Path) -> list[dict[str, Any]]:
    table = ds.dataset(sorted(map(str, out.glob("part-*"))), format="arrow").to_table()
    found: list[dict[str, Any]] = table.sort_by([("row", "ascending"), ("sample_index", "ascending")]).to_pylist()
    return found


def interrupt(out: Path) -> None:
    """All that the run did after its first part has not happened."""
    for path in [*sorted(out.glob("part-*"))[1:], *out.glob("_done-*"), out / "_SUCCESS", out / "_summary.json"]:
        path.unlink()


def test_an_interrupted_run_ends_with_the_same_rows_in_its_own_layout(made: Path, tmp_path: Path) -> None:
    out = old_run(made, tmp_path)
    interrupt(out)
    assert len(read(out)) == 2
    generate(job(tmp_path, order=Order.input))
    assert read(out) == read(made / "out")
    assert (out / "_SUCCESS").exists()
    assert not (out / ".batchmix").exists()
    with pytest.raises(BatchmixError, match=r"sampling\.max_tokens was 3, is now 4"):
        generate(job(tmp_path, max_tokens=4))


def test_all_commands_read_it(made: Path, tmp_path: Path) -> None:
    out = old_run(made, tmp_path)
    assert read_status(job(tmp_path)).exit_code == COMPLETE
    assert "each of 6 rows is there once" in finalize_folder(job(tmp_path))
    run = batchmix.Run(str(out))
    assert run.table().equals(batchmix.Run(str(made / "out")).table())
    assert run.summary["rows"] == ROWS
    assert report(job(tmp_path)) == f"the report is {out}/_report/report.html"
    assert (out / "_report/report.html").exists()
    export(replace(job(tmp_path), export=ExportConfig(dir=str(tmp_path / "set"))))
    assert len(list((tmp_path / "set/data").iterdir())) == 1
    assert not (out / ".batchmix").exists()


@pytest.mark.slow  # 5 s and more
def test_a_redo_that_was_interrupted_is_finished(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are there, and so is the journal that exchanges them, in the words of the earlier release."""
    shutil.copytree(made, tmp_path / "today")
    generate(job(tmp_path / "today", 5, redo=Redo.length))
    out = old_run(made, tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("batchmix.output.redo.exchange", killed)
        with pytest.raises(KeyboardInterrupt):
            generate(job(tmp_path, 5, redo=Redo.length))
    assert (out / "_redo/_run.json").exists()
    assert read(out) == read(made / "out")
    staged = sorted(path.relative_to(out).as_posix() for path in out.glob("_redo/**/part-*"))
    removed = sorted(path.name for path in out.glob("part-*"))
    (out / "_journal-000009.json").write_text(json.dumps({"staging": "_redo", "add": staged, "remove": removed}))
    generate(job(tmp_path, 5, redo=Redo.length))
    assert read(out) == read(tmp_path / "today/out")
    assert not (out / "_redo").exists()
    assert not list(out.glob("_journal*"))


def test_a_folder_with_a_run_of_each_layout_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out/_run.json").write_text("{}")
    with pytest.raises(BatchmixError, match=r"has both \.batchmix/run\.json and _run\.json"):
        generate(job(tmp_path))


def test_a_lease_alone_tells_the_layout(tmp_path: Path) -> None:
    """Of a worker that was killed before it had written anything else, or is just about to."""
    (tmp_path / "_workers").mkdir()
    assert not isinstance(open_output(str(tmp_path)), OldLayout)
    (tmp_path / "_workers/00000-of-00001-000001.json").write_text("{}")
    assert isinstance(open_output(str(tmp_path)), OldLayout)


def test_an_object_store(tmp_path: Path) -> None:
    store = ObjectStore(f"memory://{tmp_path}")
    assert not isinstance(open_output(f"memory://{tmp_path}"), OldLayout)
    store.replace("_run.json", lambda file: file.write(b"{}"))
    old = open_output(f"memory://{tmp_path}")
    assert isinstance(old, OldLayout)
    assert old.read(RUN) == b"{}"
    assert old.names(".batchmix/*.json") == [RUN]
    assert old.names("_*.json") == ["_run.json"]
    assert old.file_url(RUN) == f"{store.url}/_run.json"
