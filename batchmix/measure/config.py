"""The keys of `benchmark` and `tune`."""

from __future__ import annotations

from dataclasses import dataclass

from batchmix.config_key import key


@dataclass
class BenchmarkConfig:
    """What `batchmix benchmark` measures."""

    name: str = key("kernels", "kernels, throughput, peers or offload; batchmix benchmark NAME is short for it")
    shape: str = key("8x7b", "model whose sizes are used: 8x7b, 8x22b; tiny for machines without a GPU")
    only: list[str] | None = key(
        None,
        "kernels: moe, prefill, decode, linear, elementwise, launch, sampling; throughput: annotate, synthesise, long",
    )
    rows: int | None = key(None, "throughput: rows of annotate and synthesise, long has a tenth of them; null: 4,000")
    layers: int | None = key(None, "throughput: layers of the model; null: as many as fit")
    peers: list[str] | None = key(
        None,
        "throughput: transformers, generate_batch, vllm, sglang; offload: accelerate; null: all that are installed",
    )
    peers_path: str | None = key(
        None, "throughput: folders of packages (a:b) that peers import first, such as an unpacked vLLM"
    )
    peer_seconds: float = key(120.0, "throughput: seconds for a workload after which a peer starts no more rows")
    formats: list[str] | None = key(None, "moe: formats of the weights; null: all that the GPU runs")
    tokens: list[int] | None = key(None, "moe and linear: numbers of tokens; null: 1 to 65,536")
    dir: str = key(".", "folder for <date>-<gpu>-<name>.json")


@dataclass
class TuneConfig:
    """What `batchmix tune` searches."""

    seconds: float = key(240.0, "time in all; a machine with 16 cores tries every tile in 60 s a format")
    shape: str = key("8x7b", "model whose sizes are used: 8x7b or 8x22b")
    formats: list[str] = key(["bfloat16", "fp8", "int8", "int4"], "formats of the weights")
    rows: list[int] | None = key(None, "numbers of rows of an average expert; null: 4 to 4,096")
    dir: str | None = key(None, "folder for the tables; null: where the kernels look for them")
