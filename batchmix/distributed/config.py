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

    kind: ClusterKind = key(ClusterKind.none, "none: this machine alone")
    address: str | None = key(
        None, "of Ray: auto, HOST:PORT or local; null: what RAY_ADDRESS names or this machine belongs to, else local"
    )
    workers: int | None = key(None, "models at once; null: as many as the cluster has room for, also while it grows")
    cpus_per_worker: int = key(1, "that Ray keeps free for each")
    rows_per_unit: int = key(4096, "rows that a worker is given at a time")
