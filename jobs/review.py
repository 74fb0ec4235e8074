"""Hand the least certain rows to people, in Label Studio or Argilla, and read their corrections back."""

import sys
from collections.abc import Sequence

from batchmix.config import Config
from batchmix.hydra_app import first_is, job


@job("review")
def _run(config: Config) -> None:
    from batchmix.annotate.review import review  # imports pyarrow: only once the configuration is known to be right

    review(config)


def main(argv: Sequence[str] | None = None) -> int:
    """As any job, but a first argument without `=` is the action, export or import."""
    return _run(first_is("review.action", argv))


if __name__ == "__main__":
    sys.exit(main())
