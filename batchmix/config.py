"""The groups of keys there are, and which of them each job reads.

The dataclass of a group lies beside the code that reads it. Hydra fills these dataclasses (see `hydra_app.register`), so a
misspelt key or a value of the wrong type is refused before anything runs. Below `pipeline` and `jobs/` they are plain
dataclasses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from batchmix.annotate.config import AnnotateConfig, EvaluateConfig, ExportConfig, ReviewConfig
from batchmix.checkpoints.config import ConvertConfig, ModelConfig
from batchmix.distributed.config import ClusterConfig
from batchmix.engine.config import EngineConfig
from batchmix.input.config import DataConfig, ShardConfig
from batchmix.measure.config import BenchmarkConfig, TuneConfig
from batchmix.output.config import OutputConfig
from batchmix.planning.config import PlanConfig
from batchmix.sampling import SamplingConfig

_RUN = ("model", "data", "sampling", "engine", "output", "shard", "cluster")
JOBS: dict[str, tuple[str, ...]] = {
    "annotate": (*_RUN, "annotate"),
    "benchmark": ("benchmark", "model", "engine"),
    "convert": ("convert", "model", "output"),
    "evaluate": (*_RUN, "evaluate"),
    "export": ("export", "output"),
    "finalize": ("output", "shard"),
    "generate": _RUN,
    "plan": (*_RUN, "plan"),
    "report": ("output", "annotate"),
    "review": ("review", "output"),
    "status": ("output",),
    "tune": ("tune",),
}
"""The groups of keys that each job reads; it refuses those of others."""


@dataclass
class Config:
    """One job. Groups that it does not read have their defaults."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    review: ReviewConfig = field(default_factory=ReviewConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
