"""Run every prompt of a data set through a Mixtral model and write the answers as Arrow files."""

import sys

from batchmix.config import Config
from batchmix.hydra_app import job


@job("generate")
def main(config: Config) -> None:
    from batchmix.pipeline import generate  # imports torch: only once the configuration is known to be right

    generate(config)


if __name__ == "__main__":
    sys.exit(main())
