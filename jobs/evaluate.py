"""Answer a data set that has gold answers, or take a finished run, and say what share is exactly right."""

import sys

from batchmix.config import Config
from batchmix.hydra_app import job


@job("evaluate")
def main(config: Config) -> None:
    from batchmix.evaluate import evaluate  # imports pyarrow: only once the configuration is known to be right

    evaluate(config)


if __name__ == "__main__":
    sys.exit(main())
