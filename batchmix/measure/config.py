"""The keys of `benchmark` and `tune`."""

from __future__ import annotations

from dataclasses import dataclass

from batchmix.config_key import key


@dataclass
class BenchmarkConfig:
    """What `batchmix benchmark` measures."""

    name: str = key("kernels", "kernels, throughput, peers or offload; batchmix benchmark NAME is short for it")
    shape: str = key("8x7b", "whose sizes: 8x7b, 8x22b; tiny is for machines without a GPU")
    only: list[str] | None = key(
        None,
        "of kernels' moe, prefill, decode, linear, elementwise, launch, sampling; of throughput's annotate, synthesise, long",
    )
    rows: int | None = key(None, "of throughput's annotate and synthesise, long has a tenth; null: 4,000")
    layers: int | None = key(None, "of throughput's model; null: as many as fit")
    peers: list[str] | None = key(
        None,
        "of throughput's transformers, generate_batch, vllm, sglang, of offload's accelerate; null: all that are installed",
    )
    peers_path: str | None = key(
        None, "folders of packages (a:b) that peers of throughput import first, such as vLLM unpacked"
    )
    peer_seconds: float = key(120.0, "on each workload, after which a peer of throughput starts no more rows")
    formats: list[str] | None = key(None, "of weights, for moe; null: all that the GPU runs")
    tokens: list[int] | None = key(None, "for moe and linear; null: 1 to 65,536")
    dir: str = key(".", "where <date>-<gpu>-<name>.json goes")


@dataclass
class TuneConfig:
    """What `batchmix tune` searches."""

    seconds: float = key(240.0, "in all; 60 a format let a machine of 16 cores try every tile")
    shape: str = key("8x7b", "whose sizes: 8x7b or 8x22b")
    formats: list[str] = key(["bfloat16", "fp8", "int8", "int4"], "of weights")
    rows: list[int] | None = key(None, "of an average expert; null: 4 to 4,096")
    dir: str | None = key(None, "of the tables; null: where the kernels look for them")
