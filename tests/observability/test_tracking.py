"""Lines of `metrics.jsonl` in W&B, MLflow and a file for Prometheus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from processes import TICKETS

from batchmix.errors import BatchmixError
from batchmix.observability import tracking
from batchmix.observability.tracking import Trackers
from batchmix.output.config import ReportTo

Run = Callable[..., "subprocess.CompletedProcess[str]"]
LINE = {"time": 1_700_000_000.5, "shard": 1, "rows": 7, "running": 3, "output_tokens_per_second": 12.5}
CONFIG = {"model.path": "tiny", "data.limit": 3}


def trackers(*report_to: ReportTo, file: Path | None = None, identity: Mapping[str, Any] = CONFIG) -> Trackers:
    return Trackers(report_to, None if file is None else str(file), "s3://bucket/out", (1, 4), identity, CONFIG)


@pytest.mark.parametrize(
    ("module", "asked", "extra"),
    [
        ("wandb", {"report_to": [ReportTo.wandb]}, "wandb"),
        ("mlflow.entities", {"report_to": [ReportTo.mlflow]}, "mlflow"),
        ("prometheus_client", {"file": Path("x.prom")}, "prometheus"),
    ],
)
def test_one_that_is_not_installed_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, module: str, asked: dict[str, Any], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BatchmixError, match=rf"output\.(report_to|prometheus_file).*pip install.*\[{extra}\]"):
        trackers(*asked.get("report_to", ()), file=asked.get("file"))


def test_one_that_fails_gets_no_more_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Service:
        def __init__(self, *_: object) -> None:
            self.lines: list[Mapping[str, float]] = []
            opened.append(self)

        def log(self, line: Mapping[str, float]) -> None:
            self.lines.append(line)

        def finish(self, failed: bool) -> None:
            self.failed = failed

    class Failing(Service):
        def log(self, line: Mapping[str, float]) -> None:
            super().log(line)
            raise ConnectionError("no route to\nhost")

    opened: list[Service] = []
    monkeypatch.setattr(tracking, "WeightsAndBiases", Failing)
    monkeypatch.setattr(tracking, "MLflow", Service)
    with trackers(ReportTo.wandb, ReportTo.mlflow) as opened_trackers:
        opened_trackers.log(LINE)
        opened_trackers.log(LINE)
    failing, well = opened
    assert (len(failing.lines), len(well.lines), well.failed) == (1, 2, False)
    assert caplog.text.count("output.wandb: no route to host; it gets no more metrics of this run") == 1


@pytest.mark.tracking
def test_prometheus_file(tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families as parse

    file = tmp_path / "batchmix.prom"
    with trackers(file=file) as opened:
        opened.log(LINE)
        opened.log(LINE | {"rows": 9})
    found = {sample.name: sample for family in parse(file.read_text()) for sample in family.samples}
    assert found["batchmix_rows_total"].value == 9
    assert found["batchmix_running"].value == 3
    assert found["batchmix_rows_total"].labels == {"run": "s3://bucket/out", "shard": "1"}
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(BatchmixError, match=r"output\.prometheus_file=.*x\.prom: cannot be written \(No such file"):
        trackers(file=tmp_path / "none" / "x.prom")


@pytest.mark.tracking
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.as_uri())
    for rows in (7, 9):  # the second is the first resumed
        with trackers(ReportTo.mlflow) as opened:
            opened.log(LINE | {"rows": rows, "time": LINE["time"] + rows})
    with pytest.raises(ZeroDivisionError), trackers(ReportTo.mlflow, identity={"model": "another"}):
        raise ZeroDivisionError
    client = MlflowClient()
    experiment = client.get_experiment_by_name("batchmix")
    assert experiment is not None
    failed, run = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    assert (run.info.status, failed.info.status) == ("FINISHED", "FAILED")
    assert run.info.run_name == "s3://bucket/out, shard 1 of 4"
    assert run.data.params == {"model.path": "tiny", "data.limit": "3"}
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, "rows")] == [7, 9]


@pytest.mark.tracking
def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with trackers(ReportTo.wandb) as opened:
        opened.log(LINE)
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for text in (b"s3://bucket/out, shard 1 of 4", b"model.path", b"output_tokens_per_second", b"12.5"):
        assert text in content


JOB = ("generate", "model.path=tiny", f"data.path={TICKETS}", "data.limit=3", "output.dir=out")


@pytest.mark.tracking
def test_without_a_key_the_run_is_refused_before_the_model_loads(batchmix: Run, tmp_path: Path) -> None:
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    found = batchmix(*JOB, "output.report_to=[wandb]", env=hidden | {"HOME": str(tmp_path)})
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith("batchmix: error: output.report_to=[wandb]: ")
    assert "Traceback" not in found.stderr


@pytest.mark.tracking
def test_a_run_reports(batchmix: Run, tmp_path: Path) -> None:
    found = batchmix(*JOB, "output.prometheus_file=batchmix.prom")
    assert found.returncode == 0, found.stderr
    last = json.loads((tmp_path / "out" / ".batchmix" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["rows"] == 3
    text = (tmp_path / "batchmix.prom").read_text()
    assert f'",shard="0"}} {last["completion_tokens"]}.0\n' in text
