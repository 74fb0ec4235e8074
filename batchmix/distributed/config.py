"""The keys of `cluster`: other machines."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from batchmix.config_key import key


class ClusterKind(Enum):
    none = "none"
    ray = "ray"


@dataclass
class ClusterConfig:
    """Other machines that run the rows for this process; `cluster=ray` sets `kind`."""

    kind: ClusterKind = key(ClusterKind.none, "none: this machine alone; ray: a Ray cluster")
    address: str | None = key(
        None, "Ray's address: auto, HOST:PORT, local; null: RAY_ADDRESS or the cluster of this machine, else local"
    )
    workers: int | None = key(None, "models at once; null: as many as the cluster has room for, also as nodes join")
    cpus_per_worker: int = key(1, "CPUs that Ray reserves for each worker")
    rows_per_unit: int = key(4096, "rows that a worker gets at a time")
