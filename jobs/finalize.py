"""Check that every row is there exactly once, put the rows in order if asked, and mark the run as complete."""

import sys

from batchmix.config import Config
from batchmix.hydra_app import job


@job("finalize")
def main(config: Config) -> None:
    from batchmix.output.finalize import check_errors  # imports pyarrow, as the next
    from batchmix.output.stored_run import finalize_folder, open_stored

    print(finalize_folder(config))
    check_errors(open_stored(config.output.dir)[0].storage)


if __name__ == "__main__":
    sys.exit(main())
