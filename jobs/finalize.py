"""Check that every row is there exactly once, put the rows in order if asked, and write _SUCCESS."""

import sys

from batchmix.config import Config
from batchmix.hydra_app import job


@job("finalize")
def main(config: Config) -> None:
    from batchmix.output.stored_run import finalize_folder  # imports pyarrow

    print(finalize_folder(config))


if __name__ == "__main__":
    sys.exit(main())
