"""Hand the least certain rows to people, in Label Studio or Argilla, and read their corrections back."""

import sys
from collections.abc import Sequence

from batchmix.config import Config
from batchmix.hydra_app import job


@job("review")
def _run(config: Config) -> None:
    from batchmix.annotate.review import review  # imports pyarrow: only once the configuration is known to be right

    review(config)


def main(argv: Sequence[str] | None = None) -> int:
    """As any job, but a first argument without `=` is the action, export or import."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].isidentifier():
        arguments[0] = f"review.action={arguments[0]}"
    return _run(arguments)


if __name__ == "__main__":
    sys.exit(main())
