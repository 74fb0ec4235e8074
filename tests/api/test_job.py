"""`batchmix.run`: a job from Python is the one of the command line, and leaves Hydra as it was."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import batchmix
from batchmix.api.job import _written
from batchmix.cli import main
from batchmix.hydra_app import composed_job
from batchmix.output.error_rows import TooManyErrors


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_job_and_its_results(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "my label": 1}, {"prompt": "", "my label": 2}])
    overrides = {"data.path": data, "output.dir": tmp_path / "out", "sampling.n": 2, "sampling.max_tokens": 3,
                 "sampling.stop": ["it's", "a\\"], "engine.device": "cpu", "model": "tiny"}  # fmt: skip
    run = batchmix.run("generate", overrides)
    assert run.output_dir == str(tmp_path / "out")
    table = run.table()
    assert table["row"].to_pylist() == [0, 0, 1, 1]
    assert table["sample_index"].to_pylist() == [0, 1, 0, 1]
    assert table["my label"].to_pylist() == [1, 1, 2, 2]
    assert run.to_pandas()["error"].fillna("").tolist() == ["", "", "prompt is empty", "prompt is empty"]
    assert (run.summary["rows"], run.summary["error_rows"]) == (2, 1)
    assert run.summary["errors"] == [{"rows": 1, "example_row": 1, "example": "prompt is empty"}]
    config = OmegaConf.load(tmp_path / "out/.hydra/config.yaml")
    assert list(config.sampling.stop) == ["it's", "a\\"]
    again = batchmix.run("generate", [f"{key}={_written(value)}" for key, value in overrides.items()])
    assert again.table() == table  # nothing was left to do


@pytest.mark.slow  # seconds
@pytest.mark.parametrize("form", ["arrow", "parquet", "jsonl"])
def test_it_is_what_the_command_line_writes(tmp_path: Path, form: str) -> None:
    data = write(tmp_path / "rows.jsonl", [{"prompt": text} for text in ("a", "b", "c")])
    keys = [f"data.path={data}", "sampling.max_tokens=5", "engine.device=cpu", f"output.format={form}"]
    assert main(["generate", *keys, f"output.dir={tmp_path / 'shell'}"]) == 0
    run = batchmix.run("generate", [*keys, f"output.dir={tmp_path / 'python'}"])
    assert run.table().to_pylist() == batchmix.Run(str(tmp_path / "shell")).table().to_pylist()


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "null"), (True, "True"), (0.5, "0.5"), (["a,b", 1], "['a,b',1]"), ({5: -1.5}, "{5:-1.5}"),
        ("It's", r"'It\'s'"), ("a=b", "'a=b'"), (Path("/x y"), "'/x y'"),
    ],
)  # fmt: skip
def test_python_values_as_overrides(value: Any, written: str) -> None:
    assert _written(value) == written


def test_any_text_comes_through() -> None:
    texts = ["{{ a }} 'x' \"y\"", "back\\slash\\", "a: b, [c]", "null", "3", " x ", "$", "ä\n\tb", "\\'"]
    with composed_job("generate", ["data.path=x", "output.dir=o", f"data.columns={_written(texts)}"]) as config:
        assert config.data.columns == texts


def test_errors_are_exceptions(tmp_path: Path) -> None:
    for job, overrides, message in [
        ("generate", {"data.pth": "x"}, r"data\.pth: no such key, did you mean data\.path\?"),
        ("generate", {"output.dir": "o"}, "data.path must be given"),
        ("generate", ["--multirun"], "--multirun: is for the command line"),
        ("generate", ["hydra/launcher=slurm"], "hydra/launcher=slurm: is for the command line"),
        ("tune", [], r"'tune' is not among annotate, generate; use the command line: batchmix tune"),
    ]:
        with pytest.raises(batchmix.BatchmixError, match=message):
            batchmix.run(job, overrides)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a list of texts or a mapping"):
        batchmix.run("generate", "data.path=x")
    data = write(tmp_path / "rows.jsonl", [{"prompt": ""}])
    with pytest.raises(TooManyErrors, match="1 row, none could be run"):
        batchmix.run("generate", {"data.path": data, "output.dir": tmp_path / "out", "engine.device": "cpu"})
    assert batchmix.Run(str(tmp_path / "out")).table()["error"].to_pylist() == ["prompt is empty"]


def test_hydra_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text("x: ${twice:3}\n")
    OmegaConf.register_new_resolver("twice", lambda value: 2 * value, replace=True)
    ConfigStore.instance().store("schema", {"theirs": 1})  # a name that batchmix uses too
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.2"):
        before, store = compose("mine", return_hydra_config=True), ConfigStore.instance()
        HydraConfig.instance().set_config(before)
        hydra = GlobalHydra.instance().hydra
        batchmix.run("generate", {"data.path": data, "output.dir": tmp_path / "out", "sampling.max_tokens": 1})
        assert ConfigStore.instance() is store
        assert store.load("schema.yaml").node == {"theirs": 1}
        assert GlobalHydra.instance().hydra is hydra
        assert HydraConfig.get().job.config_name == "mine"
        assert compose("mine").x == 6
    assert not GlobalHydra.instance().is_initialized()
    del ConfigStore.instance().repo["schema.yaml"]
    HydraConfig.instance().cfg = None
    OmegaConf.clear_resolver("twice")


def test_a_job_outside_the_main_thread(tmp_path: Path) -> None:
    data, found = write(tmp_path / "rows.jsonl", [{"prompt": "a"}]), list[Any]()
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        found.append(
            batchmix.run("generate", {"data.path": data, "output.dir": tmp_path / "out", "sampling.max_tokens": 1})
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].summary["rows"] == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow  # two runs
def test_ctrl_c_commits_and_a_rerun_finishes_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "rows.jsonl", [{"prompt": str(number)} for number in range(40)])
    overrides = {"data.path": data, "output.dir": tmp_path / "out", "engine.max_num_seqs": 4, "sampling.max_tokens": 4,
                 "engine.sort_window": 4}  # fmt: skip
    from batchmix.output.sink import Sink

    written: list[int] = []
    write_one = Sink.write

    def interrupting(sink: Sink, completion: Any) -> None:
        write_one(sink, completion)
        written.append(completion.prompt.row)
        if len(written) == 10:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Sink, "write", interrupting)
    with pytest.raises(KeyboardInterrupt):
        batchmix.run("generate", overrides)
    assert 10 <= len(batchmix.Run(str(tmp_path / "out")).table()) < 40
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(batchmix.BatchmixError, match="so there is no summary"):
        _ = batchmix.Run(str(tmp_path / "out")).summary
    assert batchmix.run("generate", overrides).table()["row"].to_pylist() == list(range(40))


def test_sigterm_ends_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchmix.output.sink import Sink

    monkeypatch.setattr(Sink, "write", lambda sink, completion: os.kill(os.getpid(), signal.SIGTERM))
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    with pytest.raises(SystemExit) as left:
        batchmix.run("generate", {"data.path": data, "output.dir": tmp_path / "out", "sampling.max_tokens": 1})
    assert left.value.code == 75
