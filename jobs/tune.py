"""Search the fastest tiles of the expert products on this GPU, and keep them in tables."""

import sys

from batchmix.config import Config
from batchmix.hydra_app import job


@job("tune")
def main(config: Config) -> None:
    from batchmix.measure.tune import tune

    for path in tune(config.tune):
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
