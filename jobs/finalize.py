"""Check that every row is there exactly once, put the rows in order if asked, and write _SUCCESS."""

import sys

from batchmix.config import Config
from batchmix.hydra_app import job


@job("finalize")
def main(config: Config) -> None:
    from batchmix.output.all_failed import check_not_all_failed
    from batchmix.output.stored_run import finalize_folder, open_stored  # imports pyarrow

    print(finalize_folder(config))
    check_not_all_failed(open_stored(config.output.dir)[0])


if __name__ == "__main__":
    sys.exit(main())
