"""Say what a run will cost before it starts: lengths, batches, padding, refused rows, memory, hours."""

import sys
from collections.abc import Sequence

from batchmix.config import Config
from batchmix.hydra_app import job


@job("plan")
def _run(config: Config) -> None:
    from batchmix.plan import plan_report  # imports pyarrow and the tokenizer: only once the configuration is right

    plan_report(config)


def main(argv: Sequence[str] | None = None) -> int:
    """As any job, but `batchmix plan table` prints what runs on which card."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["table"]:
        from batchmix.planning.table import table_text

        print(table_text())
        return 0
    return _run(arguments)


if __name__ == "__main__":
    sys.exit(main())
