"""Make report.html of a finished run again: what ran, how fast, what the labels are, and rows to search."""

import sys

from batchmix.config import Config
from batchmix.hydra_app import job


@job("report")
def main(config: Config) -> None:
    from batchmix.annotate.page import report  # imports pyarrow: only once the configuration is known to be right

    print(report(config))


if __name__ == "__main__":
    sys.exit(main())
