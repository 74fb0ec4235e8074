"""Say how far a run is, by shard, and which of its workers are alive.

Exit codes: 0 complete, 3 running, 4 something needs attention (a stuck worker, a shard without one, too many
error rows), 1 no run there.
"""

import sys

from batchmix.config import Config
from batchmix.hydra_app import job


@job("status")
def main(config: Config) -> None:
    from batchmix.output.stored_run import read_status  # imports pyarrow

    status = read_status(config)
    print(status.text(), flush=True)
    sys.exit(status.exit_code)


if __name__ == "__main__":
    sys.exit(main())
