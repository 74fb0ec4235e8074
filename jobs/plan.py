"""Say what a run will cost before it starts: lengths, batches, padding, refused rows, memory, hours."""

import sys

from batchmix.config import Config
from batchmix.hydra_app import job


@job("plan")
def main(config: Config) -> None:
    from batchmix.pipeline import plan_report  # imports pyarrow and the tokenizer: only once the configuration is right

    plan_report(config)


if __name__ == "__main__":
    sys.exit(main())
