"""Make a data set of a finished run: Parquet, JSONL or CSV with a data-set card, and push it to the hub."""

import sys

from batchmix.config import Config
from batchmix.hydra_app import job


@job("export")
def main(config: Config) -> None:
    from batchmix.annotate.export import export  # imports pyarrow: only once the configuration is known to be right

    export(config)


if __name__ == "__main__":
    sys.exit(main())
