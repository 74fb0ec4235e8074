"""Where else the lines of `metrics.jsonl` go: Weights & Biases, MLflow, a text file for Prometheus' node_exporter."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from batchmix.errors import BatchmixError
from batchmix.install_hint import install_hint
from batchmix.output.config import ReportTo
from batchmix.redact import redact

PROJECT = "batchmix"  # of W&B, and MLflow's experiment, unless the environment names another
_COUNTERS = ("rows", "error_rows", "prompt_tokens", "completion_tokens", "preempted", "out_of_memory")
_MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}  # seconds; retries
_MLFLOW_LENGTH = 500  # characters of a parameter that every release takes
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A service or a file that shows the lines."""

    def log(self, line: Mapping[str, float]) -> None:
        """Take a line of `metrics.jsonl`; `time` in seconds since 1970."""

    def finish(self, failed: bool) -> None:
        """Say that the run has ended."""


class Trackers:
    """All trackers of a run. A context manager; what goes wrong within ends a tracker with a warning, never the run."""

    def __init__(
        self,
        report_to: Sequence[ReportTo],
        prometheus_file: str | None,
        name: str,
        shard: tuple[int, int],
        identity: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        """BatchmixError for one that cannot be opened: not installed, not logged in, no such folder.

        `name`: of the run, as it may be written; with `shard` (index, count) and `identity` it is what a resumed run is known
        by. `config`: what is shown of the configuration, by the full names of its keys.
        """
        run = name if shard[1] == 1 else f"{name}, shard {shard[0]} of {shard[1]}"
        key = hashlib.sha256(json.dumps([run, dict(identity)], sort_keys=True).encode()).hexdigest()[:16]
        self._trackers: dict[str, Tracker] = {}
        for service in report_to:
            self._trackers[service.name] = _open(service, run, key, config)
        if prometheus_file is not None:
            self._trackers["prometheus_file"] = PrometheusFile(prometheus_file, {"run": name, "shard": str(shard[0])})

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._each(lambda tracker: tracker.finish(error is not None))

    def log(self, line: Mapping[str, float]) -> None:
        """Hand a line of `metrics.jsonl` to all of them."""
        self._each(lambda tracker: tracker.log(line))

    def _each(self, call: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # a service's own kinds
                del self._trackers[name]
                _log.warning("output.%s: %s; it gets no more metrics of this run", name, _in_line(error))


class WeightsAndBiases:
    """A run of W&B; WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and the like are heeded. What is printed, code and the state of
    git stay here."""

    def __init__(self, run: str, key: str, config: Mapping[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT") or PROJECT
        settings = wandb.Settings(console="off", save_code=False, disable_git=True)
        self._run = wandb.init(
            project=project, name=run, id=key, resume="allow", config=dict(config), settings=settings
        )

    def log(self, line: Mapping[str, float]) -> None:
        self._run.log(dict(line), step=int(line["time"]))

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are heeded."""

    def __init__(self, run: str, key: str, config: Mapping[str, Any]) -> None:
        for name, value in _MLFLOW_PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        earlier = self._client.search_runs([number], f"tags.`batchmix.run` = '{key}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(number, run_name=run, tags={"batchmix.run": key}).info.run_id
        parameters = [Param(name, str(value)[:_MLFLOW_LENGTH]) for name, value in config.items()]
        for first in range(0, len(parameters), 100):  # as many as a request may have
            self._client.log_batch(self._id, params=parameters[first : first + 100])

    def log(self, line: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        at = line["time"]
        metrics = [Metric(name, value, int(at * 1000), int(at)) for name, value in line.items() if name != "time"]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class PrometheusFile:
    """A file in Prometheus' text format, which appears whole: for the textfile collector of node_exporter."""

    def __init__(self, path: str, labels: Mapping[str, str]) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ImportError:
            raise BatchmixError(
                f"output.prometheus_file: needs prometheus-client; {install_hint('prometheus')}"
            ) from None
        self._path, self._labels = path, labels
        self._line: Mapping[str, float] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        try:
            self._write()
        except OSError as error:
            raise BatchmixError(f"output.prometheus_file={path}: cannot be written ({error.strerror})") from None

    def collect(self) -> Iterator[Any]:
        """The last line, as counters and gauges with the run's labels."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        for name, value in self._line.items():
            if name in self._labels:
                continue
            family = CounterMetricFamily if name in _COUNTERS else GaugeMetricFamily
            metric = family(f"batchmix_{name}", f"{name} of metrics.jsonl", labels=list(self._labels))
            metric.add_metric(list(self._labels.values()), value)
            yield metric

    def log(self, line: Mapping[str, float]) -> None:
        self._line = line
        self._write()

    def finish(self, failed: bool) -> None:
        """Leave the last line: a run that is over shows by its `batchmix_time`, and by what reads `batchmix status`."""

    def _write(self) -> None:
        from prometheus_client import write_to_textfile

        write_to_textfile(self._path, self._registry)


def _open(service: ReportTo, run: str, key: str, config: Mapping[str, Any]) -> Tracker:
    opened: type[WeightsAndBiases] | type[MLflow] = WeightsAndBiases if service is ReportTo.wandb else MLflow
    try:
        return opened(run, key, config)
    except ImportError:
        raise BatchmixError(
            f"output.report_to=[{service.name}]: is not installed; {install_hint(service.name)}"
        ) from None
    except Exception as error:  # a service's own kinds: no key, no network, no such project
        raise BatchmixError(f"output.report_to=[{service.name}]: {_in_line(error)}") from None


def _in_line(error: Exception) -> str:
    return redact(" ".join(str(error).split()) or type(error).__name__)
