"""Measure what this GPU reaches: `batchmix benchmark kernels`, `throughput`, `peers`, `offload`."""

import sys
from collections.abc import Sequence

from batchmix.config import Config
from batchmix.errors import BatchmixError
from batchmix.hydra_app import first_is, job


@job("benchmark")
def _run(config: Config) -> None:
    if config.benchmark.name == "kernels":
        from batchmix.measure.kernels import benchmark_kernels

        path = benchmark_kernels(config.benchmark)
    elif config.benchmark.name in ("throughput", "peers"):
        from batchmix.measure.throughput import benchmark_throughput

        path = benchmark_throughput(config)
    elif config.benchmark.name == "offload":
        from batchmix.measure.offload import benchmark_offload

        path = benchmark_offload(config)
    else:
        raise BatchmixError(
            f"benchmark.name={config.benchmark.name}: no such benchmark; there are kernels, throughput, peers and offload"
        )
    print(f"written: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """As any job, but a first argument without `=` is the benchmark's name."""
    return _run(first_is("benchmark.name", argv))


if __name__ == "__main__":
    sys.exit(main())
